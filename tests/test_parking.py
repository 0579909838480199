"""Parked weights: on the host between uses, on the device in use, and nothing is lost."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn

from tests.poison import poisoned_homes
from tests.small_models import MODELS, forward
from wanoffload import HostMemoryError, host_memory
from wanoffload.pipelines import parking, tenancy
from wanoffload.pipelines.parking import Parked
from wanoffload.pipelines.tenancy import ComponentHook, Floor

__all__ = ["poisoned_homes"]


class Layer(nn.Module):
    """A component with what is hard to move: ties, buffers, odd strides, an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(8, 6)
        self.head = nn.Linear(6, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.view = nn.Parameter(self.embedding.weight.data, requires_grad=False)
        self.turned = nn.Parameter(torch.randn(5, 6).t(), requires_grad=False)
        self.nothing = nn.Parameter(torch.empty(0))
        self.register_buffer("scale", torch.tensor([2.0, 3.0]))
        self.register_buffer("table", torch.arange(6), persistent=False)
        self.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) * self.scale.sum() + self.table
        return self.head(x) + self.view.sum() + (x @ self.turned).sum()


@pytest.fixture
def layer() -> Layer:
    return Layer()


IDS = torch.tensor([1, 5, 2])


def park(module: nn.Module, device: str = "cpu") -> Parked:
    parked = Parked(module, torch.device(device, 0) if device == "cuda" else torch.device(device))
    parked.park(lambda _: None)
    return parked


def hooked(module: nn.Module, stays: bool = False, floor: Floor | None = None) -> ComponentHook:
    hook = ComponentHook(floor or Floor(), park(module), None, stays)
    tenancy.install(module, hook)
    return hook


def addresses(module: nn.Module) -> dict[str, int]:
    return {name: t.data_ptr() for name, t in (*module.named_parameters(), *module.named_buffers())}


@pytest.mark.usefixtures("poisoned_homes")
def test_a_forward_computes_with_the_copy_on_the_device(layer: Layer, device: str) -> None:
    ids = IDS.to(device)
    expected = copy.deepcopy(layer).to(device)(ids)  # a copy: moving it unties what views tie
    objects = [id(t) for t in (*layer.parameters(), *layer.buffers())]
    parked = park(layer, device)
    home = addresses(layer)
    parked.bring_in()
    assert torch.equal(layer(ids), expected)
    there = addresses(layer)
    assert all(there[name] != home[name] for name in home if name != "nothing")
    assert there["embedding.weight"] == there["view"], "a tie was broken"
    assert layer.turned.stride() == (1, 6)
    assert all(t.device.type == device for t in (*layer.parameters(), *layer.buffers()))
    parked.send_home()
    assert addresses(layer) == home
    assert [id(t) for t in (*layer.parameters(), *layer.buffers())] == objects
    # The device's copy of all was one copy; what it held is let go.
    assert parked.bytes_brought == sum(i.layout.nbytes for i in parked._images)
    assert not parked._brought


def test_parked_weights_are_page_locked_exactly_once(layer: Layer) -> None:
    parked = park(layer)
    assert len(parked._images) == 1
    distinct = [layer.embedding.weight, layer.turned, layer.scale, layer.table]
    assert parked._images[0].layout.nbytes == sum(-(-t.nbytes // 256) * 256 for t in distinct)
    assert parked._images[0].memory.locked
    memory = weakref.ref(parked._images[0])
    images = [image.memory for image in parked._images]
    parked.give_up()
    assert not images[0].locked
    assert memory() is None


def test_a_module_larger_than_one_image_is_parked_in_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parking, "IMAGE_BYTES", 512)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.Linear(64, 64, bias=False))
    x = torch.randn(2, 8)
    expected = model[:4](x)
    parked = park(model)
    sizes = [image.layout.nbytes for image in parked._images]
    assert sizes == [512, 512, 512, 512, 16384]
    parked.bring_in()
    assert torch.equal(model[:4](x), expected)
    parked.send_home()


def test_values_between_uses_are_true(layer: Layer) -> None:
    values = {name: value.clone() for name, value in layer.state_dict().items()}
    parked = park(layer)
    for _ in range(2):
        assert all(torch.equal(v, values[k]) for k, v in layer.state_dict().items())
        parked.bring_in()
        parked.send_home()
    parked.give_up()
    assert all(torch.equal(v, values[k]) for k, v in layer.state_dict().items())


def _in_place(layer: Layer) -> None:
    layer.embedding.weight.mul_(2)


def _data(layer: Layer) -> None:
    layer.turned.data = layer.turned.data * 2


def _data_in_place(layer: Layer) -> None:
    layer.embedding.weight.data += 1  # as PEFT merges an adapter


def _data_of_one_word(layer: Layer) -> None:
    layer.scale.data[1] = 5.0


def _shortened(layer: Layer) -> None:
    layer.scale.data = layer.scale.data[:1]  # the same address, another tensor


def _replaced(layer: Layer) -> None:
    layer.turned = nn.Parameter(layer.turned * 2, requires_grad=False)


def _loaded(layer: Layer) -> None:
    layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}, strict=False)


def _assigned(layer: Layer) -> None:
    state = {k: v * 2 for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, strict=False, assign=True)


def _buffer(layer: Layer) -> None:
    layer.scale = torch.tensor([5.0, 7.0])


def _added(layer: Layer) -> None:
    class Adapter(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer
            self.lora = nn.Linear(6, 8).requires_grad_(False)
            self.lora.weight.data.fill_(0.5)
            self.lora.bias.data.fill_(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.lora(x)

    layer.head = Adapter(layer.head)


WRITES = [
    _in_place,
    _data,
    _data_in_place,
    _data_of_one_word,
    _shortened,
    _replaced,
    _loaded,
    _assigned,
    _buffer,
    _added,
]


@pytest.mark.usefixtures("poisoned_homes")
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_between_uses_counts_in_the_next_use(write, layer: Layer) -> None:
    twin = Layer()
    before = twin(IDS)
    parked = park(layer)
    parked.bring_in()
    parked.send_home()
    for changed in (layer, twin):
        with torch.no_grad():
            write(changed)
    expected = twin(IDS)
    assert not torch.equal(expected, before)
    for _ in range(2):
        parked.bring_in()
        assert torch.equal(layer(IDS), expected)
        parked.send_home()
    parked.give_up()
    assert torch.equal(layer(IDS), expected)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("inference", [False, True])
def test_what_is_written_in_use_goes_home(write, inference: bool, layer: Layer) -> None:
    twin = Layer()
    parked = park(layer)
    parked.bring_in()
    for changed in (layer, twin):
        with torch.inference_mode(inference), torch.no_grad():
            write(changed)
    expected = twin(IDS)
    assert torch.equal(layer(IDS), expected)
    parked.send_home()
    assert torch.equal(layer(IDS), expected)
    parked.bring_in()
    assert torch.equal(layer(IDS), expected)


def test_a_device_too_full_to_look_for_writes_takes_everything_home(
    layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = Layer()
    _data_in_place(twin)
    parked = park(layer)
    parked.bring_in()
    _data_in_place(layer)

    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(parking.Brought, "sums", full)
    parked.send_home()
    assert torch.equal(layer(IDS), twin(IDS))


def test_no_room_on_the_device_leaves_everything_at_home(
    layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer.late = nn.Linear(2, 2)
    parked = park(layer)
    layer.late = nn.Linear(2, 2)  # a copy of its own, after the image's
    expected, home = layer(IDS), addresses(layer)

    def full(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Parked, "_copy_alone", full)
        with pytest.raises(torch.OutOfMemoryError):
            parked.bring_in()
    assert not parked.in_use
    assert addresses(layer) == home
    parked.bring_in()
    assert torch.equal(layer(IDS), expected)


def test_too_little_host_memory_is_an_error_before_anything_moves(
    layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = addresses(layer)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: host_memory.RESERVE)
    with pytest.raises(HostMemoryError, match="parking Layer"):
        park(layer)
    assert addresses(layer) == home


# The hook.


@pytest.mark.usefixtures("poisoned_homes")
def test_an_encoder_goes_home_after_its_forward_also_when_it_fails(layer: Layer) -> None:
    expected = layer(IDS)
    hook = hooked(layer)
    assert torch.equal(layer(IDS), expected)
    assert hook.floor.tenant is None
    with pytest.raises(IndexError):
        layer(torch.tensor([99]))
    assert hook.floor.tenant is None
    assert not hook.parked.in_use
    assert torch.equal(layer(IDS), expected)
    assert hook.parked.bytes_brought == 3 * hook.parked._images[0].layout.nbytes


def test_one_tenant_at_a_time() -> None:
    floor = Floor()
    one, two = Layer(), Layer()
    hooks = [hooked(module, True, floor) for module in (one, two)]
    for _ in range(2):
        one(IDS)
        assert (hooks[0].parked.in_use, hooks[1].parked.in_use) == (True, False)
    assert hooks[0].parked.bytes_brought == hooks[0].parked._images[0].layout.nbytes
    two(IDS)
    assert (hooks[0].parked.in_use, hooks[1].parked.in_use) == (False, True)
    floor.clear()
    assert not hooks[1].parked.in_use


def test_a_tenant_that_finds_no_room_is_not_there(
    layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Layer()
    floor = Floor()
    before, hook = hooked(other, True, floor), hooked(layer, True, floor)
    other(IDS)
    with monkeypatch.context() as patch:
        patch.setattr(Parked, "_bring_in", lambda _: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            layer(IDS)
    assert floor.tenant is None
    assert not before.parked.in_use
    layer(IDS)
    assert hook.parked.in_use


@pytest.fixture
def vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(base_dim=4, z_dim=4).requires_grad_(False).eval()


@pytest.mark.usefixtures("poisoned_homes")
def test_encode_and_decode_of_a_vae_bring_it_in(vae: AutoencoderKLWan) -> None:
    video, latents = torch.randn(1, 3, 5, 16, 16), torch.randn(1, 4, 2, 2, 2)
    expected = vae.encode(video).latent_dist.mean, vae.decode(latents).sample
    hook = hooked(vae, stays=True)
    assert torch.equal(vae.encode(video).latent_dist.mean, expected[0])
    assert hook.parked.in_use
    hook.floor.clear()
    assert torch.equal(vae.decode(latents).sample, expected[1])
    assert hook.parked.in_use
    hook.floor.clear()


@pytest.mark.gpu
def test_diffusers_sees_the_device_and_inputs_are_moved_there_on_a_gpu(layer: Layer) -> None:
    expected = layer(IDS)
    hook = ComponentHook(Floor(), park(layer, "cuda"), None, False)
    tenancy.install(layer, hook)
    assert get_module_execution_device(layer) == torch.device("cuda", 0)
    output = layer(ids=IDS)
    assert output.device == torch.device("cuda", 0)
    assert torch.allclose(output.cpu(), expected)
    before = torch.cuda.memory_allocated()
    layer(IDS.cuda())
    assert torch.cuda.memory_allocated() - before < 2048


def test_the_execution_device_is_the_hooks(layer: Layer) -> None:
    hook = hooked(layer)
    hook.parked.device = torch.device("meta")
    assert get_module_execution_device(layer) == torch.device("meta")


@pytest.mark.usefixtures("poisoned_homes")
def test_a_module_made_in_inference_mode_is_parked_too() -> None:
    with torch.inference_mode():
        layer = Layer()
        expected = layer(IDS)
    parked = park(layer)
    for _ in range(2):
        parked.bring_in()
        assert torch.equal(layer(IDS), expected)
        parked.send_home()
    assert layer.head.weight is layer.embedding.weight
    assert isinstance(layer.turned, nn.Parameter)


@pytest.mark.parametrize("make", ["deepcopy", "pickle"])
def test_a_copy_of_a_parked_module_is_an_ordinary_module(make: str, layer: Layer) -> None:
    attributes = set(vars(layer))
    expected = layer(IDS)
    hook = hooked(layer)
    twin = copy.deepcopy(layer) if make == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin(IDS), expected)
    assert hook.parked.bytes_brought == 0, "the copy uses the original's hook"
    assert tenancy.HF_HOOK not in vars(twin)
    assert "__reduce_ex__" not in vars(twin)
    tenancy.uninstall(layer)
    hook.parked.give_up()
    assert set(vars(layer)) == attributes


def test_what_others_put_around_the_forward_stays_when_ours_goes(layer: Layer) -> None:
    hook = hooked(layer)
    ours, calls = layer.forward, []

    def around(ids: Tensor) -> Tensor:
        calls.append(hook.parked.bytes_brought)
        return ours(ids)

    layer.forward = around
    expected = layer(IDS)
    brought = hook.parked.bytes_brought
    assert brought > 0
    tenancy.uninstall(layer)
    hook.parked.give_up()
    assert torch.equal(layer(IDS), expected)
    assert calls == [0, brought]
    assert hook.parked.bytes_brought == brought


def test_a_cache_put_on_a_parked_transformer_comes_and_goes() -> None:
    from diffusers import FirstBlockCacheConfig

    kind = MODELS["wan21_t2v"]
    model, inputs = kind()
    expected = forward(model, inputs)
    hook = hooked(model, stays=True)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("cond"):
        assert torch.equal(forward(model, inputs), expected)
    assert hook.parked.in_use
    hook.floor.clear()
    tenancy.uninstall(model)
    hook.parked.give_up()
    model._reset_stateful_cache()
    with model.cache_context("cond"):
        assert torch.equal(forward(model, inputs), expected)
    model.disable_cache()
    assert torch.equal(forward(model, inputs), expected)


def test_a_compiled_block_of_a_parked_transformer_compiles_once() -> None:
    kind = MODELS["wan21_t2v"]
    model, inputs = kind()
    torch._dynamo.reset()
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    expected = forward(model, inputs)
    once = len(compiled)
    hook = hooked(model, stays=True)
    for _ in range(3):
        assert torch.equal(forward(model, inputs), expected)
        hook.floor.clear()
    # Once more at most: parameters came from ordinary memory before, from images now.
    assert len(compiled) <= once + 1
    torch._dynamo.reset()
