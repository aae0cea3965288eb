"""linear_logprobs as an op: compilers, meta and fake tensors, and refused inputs."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.distributed as dist
from runnable import implementations
from small_tiles import BUDGETS, small_tiles  # noqa: F401 - a fixture
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_fast.ops.linear_logprobs import linear_logprobs

pytestmark = pytest.mark.parametrize("impl", implementations("linear_logprobs"))


def test_compiles_as_one_graph(impl):
    compiled = torch.compile(linear_logprobs, fullgraph=True, backend="aot_eager")
    labels, mask = torch.tensor([3, -100, 40]), torch.tensor([True, False, True])
    operands = [torch.randn(3, 8, requires_grad=True), torch.randn(41, 8, requires_grad=True)]
    results = []
    for function in (compiled, linear_logprobs):
        out = function(*operands, labels, mask=mask, temperature=0.7, softcap=5.0, impl=impl)
        loss = out.logprobs.sum() + out.entropy[0]
        results.append((*out, *torch.autograd.grad(loss, operands)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_runs_on_meta_and_fake_tensors(impl):
    if impl == "reference":
        hidden = torch.randn(2, 3, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(41, 8, device="meta", requires_grad=True)
        labels = torch.zeros(2, 3, dtype=torch.int64, device="meta")
        out = linear_logprobs(hidden, weight, labels, mask=labels == 0, impl=impl)
        (out.logprobs + out.entropy).sum().backward()
        assert hidden.grad.dtype == torch.bfloat16
        assert weight.grad.shape == (41, 8)
    with FakeTensorMode():
        labels = torch.zeros(5, dtype=torch.int64)
        out = linear_logprobs(torch.randn(5, 8), torch.randn(41, 8), labels, impl=impl)
        assert out.entropy.shape == (5,)


HIDDEN, WEIGHT, LABELS = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((HIDDEN.long(), WEIGHT, LABELS), {}, TypeError, "hidden: got torch.int64"),
        ((HIDDEN, WEIGHT.long(), LABELS), {}, TypeError, "weight: got torch.int64"),
        ((HIDDEN, WEIGHT[0], LABELS), {}, ValueError, r"weight: got shape \(3,\)"),
        ((HIDDEN, WEIGHT[:0], LABELS), {}, ValueError, r"weight: got shape \(0, 3\)"),
        ((HIDDEN, WEIGHT.T, LABELS), {}, ValueError, r"hidden: got shape \(2, 3\), .* 5\]"),
        ((HIDDEN, WEIGHT.to("meta"), LABELS), {}, ValueError, "weight: is on meta"),
        ((HIDDEN, WEIGHT, LABELS), {"bias": WEIGHT[0]}, ValueError, "bias: got shape"),
        ((HIDDEN, WEIGHT, LABELS.int()), {}, TypeError, "labels: got torch.int32"),
        ((HIDDEN, WEIGHT, LABELS[:1]), {}, ValueError, r"labels: got shape \(1,\)"),
        ((HIDDEN, WEIGHT, LABELS + 5), {}, ValueError, r"labels: got 5 at \(0,\)"),
        ((HIDDEN, WEIGHT, LABELS), {"mask": LABELS}, TypeError, "mask: got torch.int64"),
        ((HIDDEN, WEIGHT, LABELS), {"temperature": -1.0}, ValueError, "temperature: got -1.0"),
        ((HIDDEN, WEIGHT, LABELS), {"logit_scale": math.inf}, ValueError, "logit_scale: got inf"),
        ((HIDDEN, WEIGHT, LABELS), {"softcap": 0.0}, ValueError, "softcap: got 0.0"),
        ((HIDDEN, WEIGHT, LABELS), {"logits_budget_bytes": -1}, ValueError, "budget_bytes: got -1"),
    ],
)
def test_errors_name_the_argument(impl, arguments, options, error, message):
    if arguments[2].is_cuda and " at " in message:
        pytest.skip("the values of labels on a GPU are not looked at")
    with pytest.raises(error, match=message):
        linear_logprobs(*arguments, **options, impl=impl)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("sharded", ["hidden", "weight", "bias"])
def test_a_sharded_operand_is_to_be_gathered_first(impl, sharded, one_rank):
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    operands = {"hidden": torch.randn(2, 3), "weight": torch.randn(5, 3), "bias": torch.randn(5)}
    mesh = init_device_mesh(operands[sharded].device.type, (1,))
    wrapped = DTensor.from_local(operands[sharded], mesh, [Replicate()], run_check=False)
    operands[sharded] = nn.Parameter(wrapped)
    hidden, weight, bias = operands.values()
    gather = rf"{sharded}: got a DTensor, expected a plain tensor.*{sharded}\.full_tensor\(\)"
    with pytest.raises(TypeError, match=gather):
        linear_logprobs(hidden, weight, LABELS, bias=bias, impl=impl)
    operands[sharded] = operands[sharded].full_tensor()
    hidden, weight, bias = operands.values()
    assert linear_logprobs(hidden, weight, LABELS, bias=bias, impl=impl).logprobs.isfinite().all()


def test_a_subclass_of_tensor_is_refused_and_a_parameter_is_not(impl):
    class Packed(torch.Tensor):
        pass

    with pytest.raises(TypeError, match="weight: got a Packed, expected a plain tensor"):
        linear_logprobs(HIDDEN, WEIGHT.as_subclass(Packed), LABELS, impl=impl)
    out = linear_logprobs(HIDDEN, nn.Parameter(WEIGHT.clone()), LABELS, impl=impl)
    assert out.logprobs.requires_grad


class Unseen(TorchDispatchMode):
    """Raises an error where a value would be read on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
        assert func.overloadpacket.__name__ not in reads, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("budget", BUDGETS)
def test_no_value_is_read_on_the_host(impl, budget):
    if impl != "triton":
        pytest.skip("on the CPU, reading values costs nothing")
    head = (torch.randn(5, 8), torch.randn(41, 8), torch.randn(41), torch.randint(41, (5,)))
    numbers, mask, upstream = (0.7, 0.5, 20.0), torch.rand(5) < 0.5, torch.randn(2, 5)
    launchers = importlib.import_module("ppo_fast.ops.linear_logprobs.triton")
    with Unseen():
        _, *saved = launchers.linear_logprobs_forward(*head, mask, *numbers, True, budget)
        backward = (*numbers, *saved, *upstream, True, [True] * 3)
        launchers.linear_logprobs_backward(*head, mask, *backward)


@pytest.mark.parametrize("budget", [0, 700])
def test_opcheck(impl, budget):
    if impl != "triton":
        pytest.skip("the operators of the C++ kernels are checked in test_logprobs_cpp.py")
    ops = torch.ops.ppo_fast
    hidden, weight = torch.randn(5, 8).bfloat16(), torch.randn(41, 8).bfloat16()
    labels, mask = torch.randint(41, (5,)), torch.tensor([True, False, True, True, False])
    head = (hidden, weight, torch.randn(41), labels, mask, 0.7, 0.5, 20.0)
    torch.library.opcheck(ops.linear_logprobs_forward_triton.default, (*head, True, budget))
    _, *saved = ops.linear_logprobs_forward_triton.default(*head, True, budget)
    backward = (*head, *saved, *torch.randn(2, 5), True, [True, False, True])
    torch.library.opcheck(ops.linear_logprobs_backward_triton.default, backward)
