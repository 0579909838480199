"""Looking at a model: what it weighs, what it computes, of which kind it is. Nothing is changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from wanoffload.facts.model import ModelFacts
from wanoffload.facts.parts import Part, Parts, is_relevant, model_facts
from wanoffload.facts.published import did_you_mean, published


def look(model: Any) -> ModelFacts:
    """The facts of a model.

    `model`: a diffusers pipeline; a transformer; a folder in the hub's layout, with or without
    weights; the id of a published repository (`published`); or ModelFacts, which are
    returned as they are. Folders and ids are looked at without importing torch. Raises ValueError,
    which says what was wrong.
    """
    if isinstance(model, ModelFacts):
        return model
    if isinstance(model, str | os.PathLike):
        return model_facts(_by_name(os.fspath(model)))
    if hasattr(model, "components"):
        from wanoffload.facts.modules import look_at_pipeline

        return model_facts(look_at_pipeline(model))
    if hasattr(model, "named_parameters"):
        from wanoffload.facts.modules import look_at_transformer

        return model_facts(look_at_transformer(model))
    raise ValueError(
        "expected a diffusers pipeline, a transformer, a folder, the id of a published model or "
        f"ModelFacts, not {type(model).__name__}"
    )


def _by_name(name: str) -> Parts:
    folder = Path(name).expanduser()
    if not name.strip():
        raise ValueError("the name is empty: a folder, or the id of a published model, is expected")
    if folder.is_dir():
        from wanoffload.facts.folder import look_at_folder

        return look_at_folder(folder)
    if folder.exists():
        raise ValueError(f"{folder} is a file; a pipeline's folder is expected")
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise ValueError(f"there is no folder {name}{did_you_mean(name)}")
    known, entry = published(name)
    components = {name: value for name, value in entry.items() if isinstance(value, dict)}
    settings = {name: value for name, value in entry.items() if name not in components}
    parts = {name: Part(config) for name, config in components.items() if is_relevant(name)}
    return Parts(known, entry["_class_name"], settings, parts)
