"""In held forwards no buffer moves, whoever's the layer is and however the forward runs."""

import copy
import functools
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import bnstats
import cases
from bnstats.errors import BnstatsWarning, InvalidTypeError

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {"window": 3, "warmup": 2, "renorm_warmup": 5}


class Renormalizing(nn.BatchNorm1d):
    """A class of somebody's, which reads and moves its buffers by itself."""

    def forward(self, x):
        output = (x - self.running_mean) * (self.running_var + self.eps).rsqrt()
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(x.mean(0), 0.1)
                self.running_var.lerp_(x.var(0), 0.1)
                self.num_batches_tracked += 1
        return output * self.weight + self.bias


LAYERS = {
    "torch": nn.BatchNorm1d,
    "torch, per batch": functools.partial(nn.BatchNorm1d, momentum=None),
    "torch, synchronized": nn.SyncBatchNorm,
    "somebody's": Renormalizing,
    **{f.name: functools.partial(f.make, 1) for f in cases.FAMILIES},
    "moving_average": functools.partial(bnstats.MovingAverageBatchNorm1d, **SHORT),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def layers_but(*names):
    chosen = {name: make for name, make in LAYERS.items() if name not in names}
    return pytest.mark.parametrize("make", chosen.values(), ids=chosen)


def network(make):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), make(4), nn.ReLU(), nn.Linear(4, 4), make(4))
    for x in inputs(6):
        model(x).square().sum().backward()
    model.zero_grad()
    return model


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()  # it keeps few graphs of one forward, and no test's are another's


def inputs(count=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, generator=generator) * (1 + i / 3) + i / 2 for i in range(count)]


def buffers(model):
    return {key: value.clone() for key, value in model.named_buffers()}


def moved(model, before):
    return [key for key, value in model.named_buffers() if not torch.equal(value, before[key])]


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


@each_layer
def test_no_buffer_moves_and_output_and_gradient_are_those_of_training(make):
    model, (x,) = network(make), inputs()
    free = copy.deepcopy(model)
    expected = free(x)
    expected.square().sum().backward()
    before = buffers(model)
    with bnstats.hold_statistics(model):
        output = model(x)
        assert not moved(model, before)
    output.square().sum().backward()
    assert not moved(model, before)
    assert torch.equal(output, expected)
    for a, b in zip(gradients(model), gradients(free), strict=True):
        assert torch.equal(a, b)
    model(x)
    assert {"1.num_batches_tracked", "4.running_var"} <= set(moved(model, before))


@each_layer
def test_a_batch_that_is_not_finite_moves_nothing(make):
    model = network(make)
    before = buffers(model)
    with bnstats.hold_statistics(model):
        model(torch.full((8, 3), torch.nan))
    assert not moved(model, before)


@each_layer
def test_contexts_nest_overlap_and_end_with_an_error(make):
    model, (x,) = network(make), inputs()
    before = buffers(model)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    first, second = bnstats.hold_statistics(model), bnstats.hold_statistics(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # not the inner one
    model(x)
    assert not moved(model, before)
    with pytest.raises(RuntimeError, match="mat1"), bnstats.hold_statistics(model):
        model(torch.randn(8, 5))
    with pytest.raises(KeyboardInterrupt), bnstats.hold_statistics(model):
        raise KeyboardInterrupt
    model(x)
    assert not moved(model, before)
    second.__exit__(None, None, None)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert all(getattr(m, "track_running_stats", True) is True for m in model.modules())
    model(x)
    assert moved(model, before)


def test_it_decorates_a_function():
    model, (x,) = network(nn.BatchNorm1d), inputs()
    before = buffers(model)
    held = bnstats.hold_statistics(model)(model.__call__)
    for _ in range(2):
        held(x)
        assert not moved(model, before)
    model(x)
    assert moved(model, before)


@each_layer
def test_a_forward_that_fails_leaves_the_layers_own_buffers(make):
    model = network(make)
    own = [id(value) for value in model.buffers()]
    with bnstats.hold_statistics(model), pytest.raises((ValueError, RuntimeError)):
        model[1](torch.randn(8, 7))
    assert [id(value) for value in model.buffers()] == own


@each_layer
def test_include_chooses_layers(make):
    model, (x,) = network(make), inputs()
    before = buffers(model)
    with bnstats.hold_statistics(model, lambda name, _: name == "4"):
        model(x)
    names = {key.split(".")[0] for key in moved(model, before)}
    assert names == {"1"}


@each_layer
def test_copies_and_pickles_made_in_the_context_are_not_held(make):
    model, (x,) = network(make), inputs()
    before = buffers(model)
    with bnstats.hold_statistics(model):
        model(x)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for other in copies:
            other(x)
            assert moved(other, before)
        model(x)
    assert not moved(model, before)
    for other in copies:
        before = buffers(other)
        with bnstats.hold_statistics(other):
            other(x)
        assert not moved(other, before)
        other(x)
        assert moved(other, before)


@each_layer
def test_a_layer_is_held_in_every_thread(make):
    model, (x,) = network(make), inputs()
    before = buffers(model)
    with bnstats.hold_statistics(model):
        # What DataParallel does for each device, in a thread of its own.
        replicas = [module._replicate_for_data_parallel() for module in model]
        for replica, module in zip(replicas, model, strict=True):
            replica._parameters, replica._buffers = module._parameters, dict(module._buffers)
        threads = [threading.Thread(target=nn.Sequential(*replicas), args=(x,)) for _ in range(2)]
        threads.append(threading.Thread(target=model, args=(x,)))
        for thread in threads:
            thread.start()
            thread.join()
    assert not moved(model, before)


@each_layer
def test_evaluation_is_as_without(make):
    model, (x,) = network(make).eval(), inputs()
    expected = model(x)
    with bnstats.hold_statistics(model):
        assert torch.equal(model(x), expected)


@each_layer
def test_the_models_own_layers_are_let_go(make):
    model = network(make)
    with bnstats.hold_statistics(model):
        model(*inputs())
    layer = weakref.ref(model[1])
    del model
    gc.collect()
    assert layer() is None


@layers_but("somebody's", "torch, per batch")  # which torch cannot compile in one graph
def test_compiled_code_compiles_once_more_for_all_held_forwards(make):
    counter, (x,) = CompileCounter(), inputs()
    model = network(make)[:2]
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(x)
    for _ in range(4):
        before = buffers(model)
        with bnstats.hold_statistics(compiled):
            held = compiled(x)
            assert not moved(model, before)
            with bnstats.hold_statistics(model):
                compiled(x)
        held.sum().backward()
        assert not moved(model, before)
        compiled(x)
        assert moved(model, before)
    # A layer that remembers held forwards has one more tensor from the first one on.
    assert counter.frame_count <= (3 if isinstance(model[1], bnstats.MovingAverageBatchNorm) else 2)


@layers_but("somebody's", "torch, per batch")  # which torch cannot compile in one graph
def test_code_compiled_in_the_context_moves_buffers_after_it(make):
    model, (x,) = network(make)[:2], inputs()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = buffers(model)
    with bnstats.hold_statistics(model):
        compiled(x)
    assert not moved(model, before)
    compiled(x)
    assert moved(model, before)


@layers_but("somebody's", "torch, per batch")  # which torch.vmap does not take
def test_members_of_an_ensemble_are_held_under_vmap(make):
    models = [network(make) for _ in range(3)]
    base, (x,) = models[0], inputs()
    parameters, stacked = stack_module_state(models)
    before = {key: value.clone() for key, value in stacked.items()}

    def member(parameters, own):
        return functional_call(base, (parameters, own), (x,))

    expected = copy.deepcopy(base)(x)
    with bnstats.hold_statistics(base):
        outputs = vmap(member)(parameters, stacked)
    assert all(torch.equal(stacked[key], before[key]) for key in before)
    torch.testing.assert_close(outputs[0], expected)
    vmap(member)(parameters, stacked)
    assert not all(torch.equal(stacked[key], before[key]) for key in before)


def selectively(op_saved):
    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op == op_saved else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "selective": {"use_reentrant": False, "context_fn": selectively(torch.ops.aten.sub.Tensor)},
    "selective, of matrices": {
        "use_reentrant": False,
        "context_fn": selectively(torch.ops.aten.addmm.default),
    },
}
each_checkpoint = pytest.mark.parametrize("how", CHECKPOINTS.values(), ids=CHECKPOINTS)


@layers_but("somebody's")  # whose output depends on what has moved
@each_checkpoint
@pytest.mark.parametrize("first", ["held", "free"])
def test_a_checkpoint_runs_a_held_forward_again_as_it_was(make, how, first):
    """The context is left before the backward, and a free forward comes before or between."""
    model = network(make)
    plain = copy.deepcopy(model)
    x, y = (x.requires_grad_() for x in inputs(2))

    def step(model, run):
        def held():
            with bnstats.hold_statistics(model):
                return run(model, x)

        outputs = [held(), model(y)] if first == "held" else [model(y), held()]
        loss = sum(output.square().sum() for output in outputs)
        model.zero_grad()
        x.grad = None
        loss.backward()
        return [*outputs, x.grad.clone(), *gradients(model)]

    def checkpointed(model, x):
        return checkpoint(model, x, **how)

    for _ in range(3):
        expected = step(plain, lambda model, x: model(x))
        for a, b in zip(step(model, checkpointed), expected, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(buffers(model), buffers(plain), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["ema", "moving_average"])
def test_a_checkpoint_around_compiled_code_runs_a_held_forward_again(name, use_reentrant):
    model = network(LAYERS[name])[:2]
    plain, compiled = copy.deepcopy(model), torch.compile(model, backend="aot_eager")
    x, y = (x.requires_grad_() for x in inputs(2))

    def step(model, run):
        with bnstats.hold_statistics(model):
            first = run(x)
        outputs = [first, run(y)]
        model.zero_grad()
        sum(output.square().sum() for output in outputs).backward()
        return [*outputs, *gradients(model)]

    for _ in range(2):
        actual = step(model, functools.partial(checkpoint, compiled, use_reentrant=use_reentrant))
        for a, b in zip(actual, step(plain, plain), strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(buffers(model), buffers(plain), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_torchs_layers_in_compiled_code_are_held_in_a_checkpoint_within_the_context(use_reentrant):
    model = network(nn.BatchNorm1d)[:2]
    compiled = torch.compile(model, backend="aot_eager")
    x, before = inputs()[0].requires_grad_(), buffers(model)
    with bnstats.hold_statistics(model):
        checkpoint(compiled, x, use_reentrant=use_reentrant).square().sum().backward()
    assert not moved(model, before)


# torch.compile looks at the gradient of what is between two of its graphs; torch 2.6's warns of
# builtin functions that end one
@pytest.mark.filterwarnings("ignore:Graph break due to unsupported builtin")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@layers_but("somebody's", "torch, per batch", "torch, synchronized", "cumulative")
def test_the_context_may_be_in_compiled_code(make):
    model, (x,) = network(make)[:2], inputs()
    before = buffers(model)

    @torch.compile(backend="eager")
    def held(x):
        with bnstats.hold_statistics(model):
            return model(x)

    for _ in range(3):
        held(x)
        assert not moved(model, before)
    model(x)
    assert moved(model, before)


@each_checkpoint
@pytest.mark.parametrize("order", ["held first", "free first"])
def test_forwards_of_the_same_batch_are_told_apart(how, order):
    """Held and free forwards of one batch: the window takes the free one's gradient alone.

    They run again the latest first, as autograd does.
    """
    x = inputs()[0].requires_grad_()

    def step(model, run):
        outputs = []
        for kind in ("held", "free") if order == "held first" else ("free", "held"):
            if kind == "free":
                outputs.append(run(model, x))
                continue
            with bnstats.hold_statistics(model):
                outputs.append(run(model, x))
        weights = (1, 3) if order == "held first" else (3, 1)
        for weight, output in zip(weights[::-1], outputs[::-1], strict=True):
            (weight * output.square().sum()).backward()

    plain = network(functools.partial(bnstats.MovingAverageBatchNorm1d, **SHORT))
    model = copy.deepcopy(plain)
    for _ in range(4):
        step(plain, lambda model, x: model(x))
        step(model, lambda model, x: checkpoint(model, x, **how))
    torch.testing.assert_close(buffers(model), buffers(plain))


def test_free_forwards_of_torchs_layers_run_again_as_they_do_without_us():
    # torch moves them in both runs (pytorch issue 4549); a checkpoint counts what is saved
    model, (x,) = network(nn.BatchNorm1d), inputs()
    other = copy.deepcopy(model)
    with bnstats.hold_statistics(model):
        model(x)
    for m in (model, other):
        checkpoint(m, x, use_reentrant=False).sum().backward()
    assert not moved(model, buffers(other))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_hooks_for_a_second_run_go_when_the_layer_evaluates():
    model, (x,) = network(nn.BatchNorm1d), inputs()
    with bnstats.hold_statistics(model):
        output = checkpoint(model, x, use_reentrant=False)
    assert len(model[1]._forward_hooks) == len(model[1]._forward_pre_hooks) == 1
    output.sum().backward()
    model.eval()(x)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch.jit.script(model)


def test_a_held_forward_whose_backward_comes_too_late_is_an_error():
    model = network(functools.partial(bnstats.MovingAverageBatchNorm1d, **SHORT))
    first, *others = inputs(5)
    with bnstats.hold_statistics(model):
        output = checkpoint(model, first, use_reentrant=False)
        for x in others:
            model(x)
    with pytest.raises(bnstats.errors.InvalidValueError, match="window=3"):
        output.sum().backward()


@pytest.mark.filterwarnings("ignore:the model will evaluate differently")
@pytest.mark.parametrize("to", ["ema", "cumulative", "moving_average", "renorm"])
def test_conversion_in_the_context_leaves_nothing_behind(to):
    model, (x,) = network(nn.BatchNorm1d), inputs()
    with bnstats.hold_statistics(model):
        bnstats.convert_batchnorm(model, to, momentum=0.1)
    with bnstats.hold_statistics(model):
        bnstats.revert_batchnorm(model)
    before = buffers(model)
    model(x)
    assert set(moved(model, before)) == set(before)
    assert all(getattr(m, "track_running_stats", True) is True for m in model.modules())


@pytest.mark.filterwarnings("ignore:the model will evaluate differently")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("to", [None, "ema", "cumulative", "moving_average", "renorm"])
@pytest.mark.parametrize("make", [nn.BatchNorm1d, bnstats.EMABatchNorm1d])
def test_a_layer_that_is_converted_in_the_context_stays_held(make, to, checkpointed):
    model, (x,) = network(make), inputs()
    with bnstats.hold_statistics(model), bnstats.hold_statistics(model):
        convert = bnstats.revert_batchnorm if to is None else bnstats.convert_batchnorm
        convert(model, *([] if to is None else [to]))
        before = buffers(model)
        run = functools.partial(checkpoint, model) if checkpointed else lambda x, **_: model(x)
        run(x, use_reentrant=False).sum().backward()
        assert not moved(model, before)
    model(x)
    assert moved(model, before)


def test_moving_a_held_layer_keeps_it_held():
    model = network(functools.partial(bnstats.MovingAverageBatchNorm1d, **SHORT))
    with bnstats.hold_statistics(model):
        model.double()
        before, (x,) = buffers(model), inputs()
        checkpoint(model, x.double(), use_reentrant=False).sum().backward()
        assert not moved(model, before)


def test_bad_input():
    with pytest.raises(InvalidTypeError, match=r"expected a torch\.nn\.Module, got int"):
        bnstats.hold_statistics(3)
    with pytest.raises(InvalidTypeError, match="lazy"):
        bnstats.hold_statistics(nn.Sequential(nn.LazyBatchNorm1d()))
    with pytest.warns(BnstatsWarning, match="no BatchNorm layer .* nothing to hold") as caught:
        held = bnstats.hold_statistics(nn.Linear(2, 2))
    with held:
        pass
    assert caught[0].filename == __file__
    with pytest.warns(BnstatsWarning, match="that include chooses, of 2: '1', '4'"):
        bnstats.hold_statistics(network(nn.BatchNorm1d), lambda *_: False)
