"""A recording passes the gradients the model passes, and stops those it stops; where that cannot be told, it is refused by name."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffcr_surgery import trace
from diffcr_surgery.errors import TraceError
from tests.unit.test_trace import Root, same, x


def gradients(model, run, *args):
    model.zero_grad()
    run(*args).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(recorded, model, *args):
    wanted, got = gradients(model, model, *args), gradients(model, recorded.run, *args)
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_gradients_pass_and_stop_where_they_do_in_the_model():
    def forward(self, x, other):
        with torch.no_grad():
            shift = self.block(x).mean()
        return self.block(x) * self.scale + shift

    model = Root(forward)
    assert_same_gradients(trace(model, (x(),)), model, x(seed=1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_pass_through_checkpointed_blocks(reentrant):
    """Reentrant checkpointing runs its forward with gradients off, and once more with them."""

    def forward(self, x, other):
        return checkpoint(lambda x: self.block(x * self.scale), x * self.scale, use_reentrant=reentrant)

    model = Root(forward)
    recorded = trace(model, (x(),))
    assert [block.checkpointed for block in recorded.recording.blocks.values()] == [True]
    assert len(gradients(model, model, x(seed=1))) == len(list(model.parameters()))
    assert_same_gradients(recorded, model, x(seed=1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_stop_around_checkpointed_blocks_where_they_do_in_the_model(reentrant):
    def forward(self, x, other):
        x = x * self.scale
        with torch.no_grad():
            guess = checkpoint(self.block, x, use_reentrant=reentrant)
        return self.block(x) + guess

    model = Root(forward)
    assert_same_gradients(trace(model, (x(),)), model, x(seed=1))


def test_gradients_switched_off_inside_a_reentrant_checkpoint():
    """Seen from there, they are off all along: which calls the backward pass would leave out cannot be told, but in a module kept whole."""

    def shifted(x):
        with torch.no_grad():
            shift = x.mean()
        return x - shift

    class Shifted(nn.Module):
        def forward(self, x):
            return shifted(x)

    model = Root(lambda self, x, other: checkpoint(self.shifted, self.block(x * self.scale), use_reentrant=True))
    model.shifted = Shifted()
    assert_same_gradients(trace(model, (x(),)), model, x(seed=1))
    del model.shifted
    model.shifted = shifted
    with pytest.raises(TraceError, match=r"_set_grad_enabled.*CheckpointFunction.*use_reentrant=False"):
        trace(model, (x(),))


class Halved(torch.autograd.Function):
    """Scales the gradient alone."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


class Reversed(torch.autograd.Function):
    """Returns what it is given, of which torch makes a view."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Rounded(torch.autograd.Function):
    """A straight-through estimator, written the newer way."""

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize(("function", "name"), [(Halved, "Halved"), (Rounded, "Rounded"), (Reversed, "autograd.function.Function")])
def test_custom_autograd_functions_are_kept_in_submodules_and_refused_outside(function, name):
    class Scale(nn.Module):
        def forward(self, x):
            return function.apply(x)

    model = Root(lambda self, x, other: self.block(self.how(x * self.scale)))
    model.how = Scale()
    assert_same_gradients(trace(model, (x(),)), model, x(seed=1))
    del model.how
    model.how = function.apply
    with pytest.raises(TraceError, match=rf"{name}, a custom.*submodule, which is kept whole"):
        trace(model, (x(),))
    with torch.no_grad():
        same(trace(model, (x(),)), model, x(seed=1))


def test_gradients_pass_blocks_that_had_backward_hooks_when_they_were_recorded():
    """Torch puts a custom autograd function of its own around the call of such a block."""
    model = Root(lambda self, x, other: self.block(self.block(x * self.scale)))
    model.block.register_full_backward_hook(lambda _, given, taken: (2 * given[0],))
    assert_same_gradients(trace(model, (x(),)), model, x(seed=1))


def test_a_checkpointed_function_may_return_what_it_was_given():
    model = Root(lambda self, x, other: self.block(checkpoint(lambda x: x, x * self.scale, use_reentrant=True)))
    assert_same_gradients(trace(model, (x(),)), model, x(seed=1))


def test_a_block_called_inside_a_custom_autograd_function_is_refused():
    """As older code does, which brings a checkpoint function of its own."""

    class Checkpoint(torch.autograd.Function):
        @staticmethod
        def forward(ctx, run, x):
            return run(x)

        @staticmethod
        def backward(ctx, gradient):
            return None, gradient

    model = Root(lambda self, x, other: Checkpoint.apply(self.block, x * self.scale))
    with pytest.raises(TraceError, match=r"block runs inside.*Checkpoint"):
        trace(model, (x(),))
