"""The demo: a short clip from a prompt, once offloaded and once resident, compared bit for bit.

`python -m demo` runs it. In the order of the flow: `options` reads the command line, `source` finds
the model (`checkpoint` writes a small one with random weights where none is named), `worker` is one
run of the pipeline in a process of its own, `report` says what came out, `video` writes the clip.
`run` holds these together.
"""


class DemoError(Exception):
    """The demo can't go on; the message says what is wrong and what to change."""
