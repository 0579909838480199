"""Rule 7: outside a forward a wrapped module tells the truth, and what changes its weights takes
effect in the very next forward, although the first blocks are prefetched by then. So it is wherever
the weights stand on the host."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

import wanoffload
from tests.small_models import MODELS, Inputs, forward
from wanoffload import MoveError, UnboundWeightError, WeightChangeError
from wanoffload.host_tensor import HostTensor

KIND = MODELS["wan21_t2v"]


TIERS = ["pinned", "pageable", "disk", "pinned packed", "pageable packed", "disk packed"]


@pytest.fixture(autouse=True, params=TIERS)
def tier(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    host, _, packed = request.param.partition(" ")
    options = {"pack": True, "cache": tmp_path / "cache"} if packed else {}

    def streamed(prefetch: int, device: str) -> nn.Module:
        if host != "disk":
            options.pop("cache", None)
            return wanoffload.wrap(KIND.make(), prefetch, device=device, host=host, **options)
        folder = tmp_path / "checkpoint"
        KIND.make().save_pretrained(folder)
        model = wanoffload.load(
            WanTransformer3DModel,
            folder,
            torch_dtype=torch.bfloat16,
            prefetch=prefetch,
            device=device,
            host="disk",
            **options,
        )
        assert set(wanoffload.offloader(model).tiers) == {"disk"}
        model.register_to_config(_name_or_path="")  # as of one that was not loaded
        return model.requires_grad_(False)

    monkeypatch.setattr(Pair, "streamed", streamed, raising=False)
    return host


class Pair:
    """A wrapped model that has run (so that its first blocks are prefetched), and a resident twin
    to which the same is done."""

    streamed: Callable[[int, str], nn.Module]  # a streamed model, by prefetch and device

    def __init__(self, device: str, prefetch: int = 2) -> None:
        self.device = device
        self.wrapped = Pair.streamed(prefetch, device)
        self.resident = KIND.make().to(device)
        self.inputs: Inputs = KIND.inputs(device)
        self.check_outputs()

    def check_outputs(self) -> Tensor:
        output = forward(self.wrapped, self.inputs)
        assert torch.equal(output, forward(self.resident, self.inputs))
        return output

    def both(self, change: Callable[[nn.Module], object]) -> None:
        """Changes both, and the outputs change, in the same way."""
        before = self.check_outputs()
        acquires = wanoffload.offloader(self.wrapped).stats().acquires
        with torch.no_grad():
            change(self.wrapped)
            change(self.resident)
        after = self.check_outputs()
        assert not torch.equal(before, after)
        assert wanoffload.offloader(self.wrapped).stats().acquires == acquires + KIND.units
        self.check_values()

    def check_values(self) -> None:
        expected = self.resident.state_dict()
        found = self.wrapped.state_dict()
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name].cpu(), value.cpu()), name


@pytest.fixture
def pair(device: str) -> Pair:
    return Pair(device)


def first(model: nn.Module) -> nn.Linear:
    """A matrix of the first block, which is prefetched between forwards."""
    layer: nn.Linear = model.blocks[0].attn1.to_q
    return layer


# Reading.


def test_parameters_and_state_dict_have_the_true_values(pair: Pair) -> None:
    pair.check_values()
    for (name, found), (_, expected) in zip(
        pair.wrapped.named_parameters(), pair.resident.named_parameters(), strict=True
    ):
        assert isinstance(found, nn.Parameter)
        assert (found.shape, found.stride(), found.numel(), found.dtype, found.requires_grad) == (
            expected.shape,
            expected.stride(),
            expected.numel(),
            expected.dtype,
            expected.requires_grad,
        ), name
        assert torch.equal(found.cpu(), expected.cpu()), name


def test_model_and_block_weights_name_their_devices(pair: Pair) -> None:
    assert pair.wrapped.device.type == pair.device
    assert pair.wrapped.dtype == pair.resident.dtype == torch.bfloat16
    assert pair.wrapped.num_parameters() == pair.resident.num_parameters()
    assert first(pair.wrapped).weight.device.type == "cpu"
    assert pair.wrapped.patch_embedding.weight.device.type == pair.device


def test_no_placeholder_ever_stands_for_a_weight(pair: Pair) -> None:
    """Bug 11: a placeholder of one element met code that read it as a weight. Also between blocks
    of a forward, and inside another block."""
    shapes = [p.shape for p in pair.resident.parameters()]
    seen = []

    def look(*_: object) -> None:
        seen.append([p.shape for p in pair.wrapped.parameters()])

    handles = [block.register_forward_hook(look) for block in pair.wrapped.blocks]
    forward(pair.wrapped, pair.inputs)
    for handle in handles:
        handle.remove()
    assert seen == [shapes] * KIND.units


def test_state_dict_of_a_wrapped_model_is_the_weights(pair: Pair) -> None:
    """Bug 8: the state_dict of an offloaded model was uninitialised memory."""
    restored = KIND.make(seed=5).to(pair.device)
    restored.load_state_dict(pair.wrapped.state_dict())
    assert torch.equal(forward(restored, pair.inputs), forward(pair.resident, pair.inputs))


@pytest.mark.parametrize("shards", ["10GB", "20KB"])
def test_save_pretrained_writes_what_the_resident_model_writes(
    pair: Pair, shards: str, tmp_path: Path
) -> None:
    for name, model in (("wrapped", pair.wrapped), ("resident", pair.resident)):
        model.save_pretrained(tmp_path / name, max_shard_size=shards)
    files = sorted(path.name for path in (tmp_path / "resident").iterdir())
    assert sorted(path.name for path in (tmp_path / "wrapped").iterdir()) == files
    assert (len(files) > 5) == (shards == "20KB")
    for file in files:
        found, expected = (
            (tmp_path / name / file).read_bytes() for name in ("wrapped", "resident")
        )
        assert found.replace(b'  "_name_or_path": "",\n', b"") == expected, file
    loaded = WanTransformer3DModel.from_pretrained(
        tmp_path / "wrapped", torch_dtype=torch.bfloat16
    ).to(pair.device)
    assert torch.equal(forward(loaded, pair.inputs), forward(pair.resident, pair.inputs))


def test_saving_one_tensor_saves_one_tensor(pair: Pair) -> None:
    for value in (first(pair.wrapped).bias, pair.wrapped.state_dict()["blocks.0.attn1.to_q.bias"]):
        file = io.BytesIO()
        torch.save(value, file)
        assert file.tell() < 4096
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert type(loaded) in (Tensor, nn.Parameter)
        assert torch.equal(loaded.cpu(), first(pair.resident).bias.cpu())


def test_a_deep_copy_is_an_ordinary_model_with_the_same_values(pair: Pair) -> None:
    twin = copy.deepcopy(pair.wrapped)
    assert all(type(p) is nn.Parameter for p in twin.parameters())
    with pytest.raises(wanoffload.WrapError, match="not wrapped"):
        wanoffload.offloader(twin)
    first(twin).weight.data.zero_()
    pair.check_outputs()
    pair.check_values()
    twin.to(pair.device)
    first(pair.resident).weight.data.zero_()
    expected = forward(pair.resident, pair.inputs)
    assert torch.equal(forward(twin, pair.inputs), expected)
    wanoffload.wrap(twin, device=pair.device)
    assert torch.equal(forward(twin, pair.inputs), expected)
    assert wanoffload.offloader(twin).stats().acquires == KIND.units
    assert torch.equal(forward(wanoffload.unwrap(twin, pair.device), pair.inputs), expected)


def test_a_pickled_model_is_an_ordinary_one(pair: Pair) -> None:
    file = io.BytesIO()
    torch.save(pair.wrapped, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False).to(pair.device)
    assert all(type(p) is nn.Parameter for p in twin.parameters())
    assert torch.equal(forward(twin, pair.inputs), forward(pair.resident, pair.inputs))


def test_a_copied_block_is_an_ordinary_one(pair: Pair) -> None:
    block = copy.deepcopy(pair.wrapped.blocks[1])
    for found, expected in zip(
        block.parameters(), pair.resident.blocks[1].parameters(), strict=True
    ):
        assert type(found) is nn.Parameter
        assert torch.equal(found.cpu(), expected.cpu())


def test_numpy_gives_the_values_and_refuses_to_be_written(pair: Pair) -> None:
    weight = pair.wrapped.blocks[0].norm2.weight
    array = weight.detach().numpy()
    assert torch.equal(torch.tensor(array), pair.resident.blocks[0].norm2.weight.cpu())
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_weights_read_in_a_forward_outside_of_their_block_are_an_error(pair: Pair) -> None:
    """So that a dead hook can't pass for a live one on the CPU, where values would be the same."""
    block = pair.wrapped.blocks[0]
    handle = block.register_forward_pre_hook(lambda *_: pair.wrapped.blocks[3].norm2.weight + 1)
    with pytest.raises(UnboundWeightError, match=r"blocks\.3"):
        forward(pair.wrapped, pair.inputs)
    handle.remove()
    pair.check_outputs()


# Writing.


def _write_in_place(model: nn.Module) -> None:
    first(model).weight.mul_(2)


def _write_data_in_place(model: nn.Module) -> None:
    first(model).weight.data += 0.5


def _write_a_view_of_data(model: nn.Module) -> None:
    first(model).weight.data.view(-1)[3:9].fill_(4)


def _copy_into(model: nn.Module) -> None:
    first(model).weight.copy_(
        torch.arange(first(model).weight.numel()).view_as(first(model).weight) / 1000
    )


def _assign_data(model: nn.Module) -> None:
    first(model).weight.data = torch.full_like(first(model).weight, 0.25).detach()


def _assign_a_parameter(model: nn.Module) -> None:
    first(model).weight = nn.Parameter(torch.full_like(first(model).weight, 0.125))


def _write_through_state_dict(model: nn.Module) -> None:
    model.state_dict()["blocks.0.attn1.to_q.weight"].mul_(3)


def _load(model: nn.Module) -> None:
    model.load_state_dict(KIND.make(seed=9).state_dict())


def _load_assigning(model: nn.Module) -> None:
    device = model.patch_embedding.weight.device
    state = {k: v.to(device) for k, v in KIND.make(seed=9).state_dict().items()}
    model.load_state_dict(state, assign=True)


def _write_with_init(model: nn.Module) -> None:
    for parameter in model.blocks[0].parameters():
        nn.init.constant_(parameter, 0.01)


def _write_every_block(model: nn.Module) -> None:
    for parameter in model.blocks.parameters():
        parameter.data.mul_(1.5)


def _foreach(model: nn.Module) -> None:
    torch._foreach_mul_(list(model.blocks[0].parameters()), 2.0)


@pytest.mark.parametrize("prefetch", [0, 1, 2, 9])
@pytest.mark.parametrize(
    "change",
    [
        _write_in_place,
        _write_data_in_place,
        _write_a_view_of_data,
        _copy_into,
        _assign_data,
        _assign_a_parameter,
        _write_through_state_dict,
        _load,
        _load_assigning,
        _write_with_init,
        _write_every_block,
        _foreach,
    ],
    ids=lambda function: function.__name__.strip("_"),
)
def test_a_write_takes_effect_in_the_next_forward(
    change: Callable[[nn.Module], object], prefetch: int, device: str
) -> None:
    """Bugs 5 and 8, and what PEFT does: `weight.data += delta` bumps no version counter."""
    pair = Pair(device, prefetch)
    pair.both(change)
    wanoffload.unwrap(pair.wrapped, device)
    pair.check_values()


def test_a_replaced_weight_is_the_users_until_the_next_forward_and_ours_after(pair: Pair) -> None:
    new = nn.Parameter(torch.full_like(first(pair.resident).weight, 0.5), requires_grad=False)
    first(pair.wrapped).weight = new
    assert first(pair.wrapped).weight is new
    first(pair.resident).weight.data.fill_(0.5)
    pair.check_values()
    pair.check_outputs()
    assert isinstance(first(pair.wrapped).weight, HostTensor)
    assert not first(pair.wrapped).weight.requires_grad
    pair.check_values()


def test_a_replaced_weight_survives_unwrap_without_a_forward(pair: Pair) -> None:
    first(pair.wrapped).weight = nn.Parameter(torch.full_like(first(pair.resident).weight, 0.5))
    first(pair.resident).weight.data.fill_(0.5)
    wanoffload.unwrap(pair.wrapped, pair.device)
    pair.check_values()


@pytest.mark.parametrize("new", [torch.zeros(3, 3), torch.zeros(64, 64, dtype=torch.float64)])
def test_a_weight_of_another_shape_or_dtype_is_refused_by_name(pair: Pair, new: Tensor) -> None:
    weight = first(pair.wrapped).weight
    with pytest.raises(WeightChangeError, match="unwrap"):
        weight.data = new
    pair.check_outputs()
    first(pair.wrapped).weight = nn.Parameter(new)
    with pytest.raises(WeightChangeError, match=r"blocks\.0\.attn1\.to_q\.weight was replaced"):
        forward(pair.wrapped, pair.inputs)
    first(pair.wrapped).weight = weight
    pair.check_outputs()


def test_a_removed_weight_is_refused_by_name(pair: Pair) -> None:
    layer = first(pair.wrapped)
    weight = layer.weight
    del layer.weight
    with pytest.raises(WeightChangeError, match=r"blocks\.0\.attn1\.to_q\.weight was removed"):
        forward(pair.wrapped, pair.inputs)
    layer.register_parameter("weight", weight)
    pair.check_outputs()


def test_an_added_weight_is_refused_by_name(pair: Pair) -> None:
    layer = first(pair.wrapped)
    layer.register_parameter("extra", nn.Parameter(torch.zeros(3)))
    with pytest.raises(WeightChangeError, match=r"blocks\.0\.attn1\.to_q\.extra was added"):
        forward(pair.wrapped, pair.inputs)
    del layer.extra
    pair.check_outputs()


def test_changing_a_weights_shape_in_place_is_refused(pair: Pair) -> None:
    with pytest.raises(WeightChangeError, match="shape"):
        first(pair.wrapped).weight.data.t_()
    pair.check_outputs()
    pair.check_values()


def test_operands_on_the_device_are_brought_to_the_weight(pair: Pair) -> None:
    """As LoRA fusing needs it: the delta is computed on the device."""

    def change(model: nn.Module) -> None:
        delta = torch.full_like(first(model).weight, 0.125, device=pair.device)
        first(model).weight.data += delta
        merged = first(model).weight.data.clone()
        merged += delta
        first(model).weight.data = merged

    pair.both(change)


# Moving.


def test_moving_to_the_wrapped_device_moves_the_rest_and_says_nothing(
    pair: Pair, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [w.data_ptr() for b in wanoffload.offloader(pair.wrapped).bindings for w in b.weights]
    pair.wrapped.patch_embedding.to("cpu")
    assert pair.wrapped.to(pair.device) is pair.wrapped
    assert pair.wrapped.to(device=torch.device(pair.device)) is pair.wrapped
    assert pair.wrapped.patch_embedding.weight.device.type == pair.device
    bindings = wanoffload.offloader(pair.wrapped).bindings
    assert [w.data_ptr() for b in bindings for w in b.weights] == before
    pair.check_outputs()
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to("meta"),
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: nn.Module.to(m, torch.float16),
        lambda m: m.blocks.to(torch.float16),
        lambda m: m.blocks[2].half(),
        lambda m: nn.ModuleDict({"inner": m}).half(),
    ],
)
def test_another_device_or_dtype_is_an_error_before_anything_moves(
    pair: Pair, move: Callable[[nn.Module], object]
) -> None:
    before = [(id(p), p.data_ptr(), p.dtype) for p in pair.wrapped.parameters()]
    with pytest.raises(MoveError, match=r"unwrap\(model\) first"):
        move(pair.wrapped)
    assert [(id(p), p.data_ptr(), p.dtype) for p in pair.wrapped.parameters()] == before
    pair.check_outputs()


@pytest.mark.gpu
def test_moving_to_the_cpu_is_an_error_where_the_model_is_wrapped_for_cuda() -> None:
    pair = Pair("cuda")
    with pytest.raises(MoveError, match="wrapped for cuda:0"):
        pair.wrapped.to("cpu")
    with pytest.raises(MoveError, match="wrapped for cuda:0"):
        pair.wrapped.cpu()
    assert pair.wrapped.cuda() is pair.wrapped
    pair.check_outputs()


def test_requires_grad_is_kept_and_can_be_changed(pair: Pair) -> None:
    pair.wrapped.requires_grad_(True)
    assert first(pair.wrapped).weight.requires_grad
    pair.check_outputs()
    pair.wrapped.requires_grad_(False)
    assert not first(pair.wrapped).weight.requires_grad
    wanoffload.unwrap(pair.wrapped)
    assert not any(p.requires_grad for p in pair.wrapped.parameters())
