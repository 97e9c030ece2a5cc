"""The head computes the loss without the logits: the same loss and gradients, in less memory."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from cases.families import CASES, inputs_of, our_model
from est_ds.data.objectives import OBJECTIVES
from est_ds.data.objectives.base import Settings
from est_ds.data.objectives.causal import CausalSettings
from est_ds.data.objectives.loss import IGNORED, token_loss
from est_ds.engine import head
from est_ds.engine.loss import RowLoss
from live_bytes import LiveBytes

FAMILIES = ("llama", "gpt2", "bert", "t5", "mamba")


def labels_of(case) -> torch.Tensor:
    """Of the last inputs, int64 [B, T], some ignored."""
    ids = list(inputs_of(case).values())[-1]
    labels = (ids * 7 + 3) % case.section["vocab_size"]
    labels[0, ::3] = IGNORED
    return labels


def losses_of(model, loss: RowLoss, case, labels):
    """The mean loss, losses and targets of the rows, and the gradients."""
    model.train()
    cache = {} if case.auto_class == "AutoModelForMaskedLM" else {"use_cache": False}
    with loss.noted() as rows:
        loss.expect(labels)
        found = loss(model(**inputs_of(case), **cache).logits, labels)
    found.backward()
    return found, rows, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("given", ["number of labels", "divisor"])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_the_logits(name, given, monkeypatch):
    monkeypatch.setattr(head, "FEWEST_ROWS", 5)  # several chunks, the last one shorter
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 1)
    case = CASES[name]
    labels = labels_of(case)
    labels = labels if given == "number of labels" else (labels, torch.tensor(7.0))
    fused, plain = our_model(case), our_model(case)
    before = list(fused.state_dict())
    found = losses_of(fused, RowLoss.of(CausalSettings(), fused), case, labels)
    expected = losses_of(plain, RowLoss(token_loss), case, labels)
    assert list(fused.state_dict()) == before
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert found[1].targets == expected[1].targets
    assert found[1].losses == pytest.approx(expected[1].losses, rel=1e-6)
    whole = torch.nn.utils.get_total_norm(expected[2].values())
    for name, gradient in expected[2].items():  # BERT's bias of keys has one of rounding alone
        apart = (found[2][name] - gradient).norm()
        assert apart <= 1e-6 * max(gradient.norm(), 1e-2 * whole), name
    ids = inputs_of(case)
    with torch.no_grad():  # without labels it is the head that it was
        assert torch.equal(fused.eval()(**ids).logits, plain.eval()(**ids).logits)


def test_one_chunk_has_the_losses_of_cross_entropy_to_the_bit_and_no_gradient_where_none_is_asked():
    case = CASES["llama"]
    model, labels = our_model(case), labels_of(case)
    logits = model(**inputs_of(case), use_cache=False).logits.detach()
    loss = RowLoss.of(CausalSettings(), model)
    loss.expect(labels)
    with torch.no_grad():
        model(**inputs_of(case), use_cache=False)
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    assert torch.equal(model.get_output_embeddings().est_losses.flatten(), expected)


def test_an_infinite_loss_has_gradients_that_are_no_numbers():
    case = CASES["llama"]
    model, labels = our_model(case), labels_of(case)
    loss = RowLoss.of(CausalSettings(), model)
    with torch.no_grad():
        model.get_output_embeddings().weight[labels[0, 1]] = -torch.inf
    found, _, grads = losses_of(model, loss, case, labels)
    assert not found.isfinite() and all(g.isnan().any() for g in grads.values())


class OwnLoss(CausalSettings):
    @staticmethod
    def loss(logits_BTV, labels):
        return Settings.loss(logits_BTV, labels) + logits_BTV.square().mean()


def test_an_objective_with_a_loss_of_its_own_reads_the_logits():
    case = CASES["llama"]
    model, labels = our_model(case), labels_of(case)
    logits = model(**inputs_of(case), use_cache=False).logits
    found, _, _ = losses_of(model, RowLoss.of(OwnLoss(), model), case, labels)
    assert found == token_loss(logits, labels) + logits.square().mean()


class Products(TorchDispatchMode):
    """Notes the types of the matrix products whose result is as wide as the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.types = vocabulary, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            if out.shape[-1] == self.vocabulary:
                self.types.append(out.dtype)
        return out


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bf16_the_product_is_in_bf16_and_the_loss_in_fp32(name):
    case = CASES[name]
    fused, plain = our_model(case).bfloat16(), our_model(case).bfloat16()
    labels, products = labels_of(case), Products(case.section["vocab_size"])
    with products:
        found = losses_of(fused, RowLoss.of(CausalSettings(), fused), case, labels)
    assert products.types == [torch.bfloat16]
    expected = losses_of(plain, RowLoss(token_loss), case, labels)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    apart = [found[2][name] - gradient for name, gradient in expected[2].items()]
    norm = torch.nn.utils.get_total_norm
    assert norm(apart) <= 2e-2 * norm(expected[2].values())


def test_in_bf16_chunks_are_added_in_fp32(monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(512, 16).bfloat16(), torch.randn(64, 16).bfloat16().requires_grad_()
    labels = torch.randint(64, (512,))

    def gradient(fewest: int) -> torch.Tensor:
        monkeypatch.setattr(head, "FEWEST_ROWS", fewest)
        monkeypatch.setattr(head, "LOGITS_AT_ONCE", 1)
        summed, _ = head.summed_loss(x, weight, None, labels)
        return torch.autograd.grad(summed, weight)[0].double()

    exact = weight.detach().double().requires_grad_()
    cross_entropy(linear(x.double(), exact), labels, reduction="sum").backward()
    one, many = ((gradient(rows) - exact.grad).norm() for rows in (512, 4))
    assert many <= 1.5 * one  # 128 roundings of a total in bf16 are beyond


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary_takes_a_quarter_of_the_memory(dtype):
    """Weight, what reads it, loss and all gradients; tensors without memory, of the real sizes."""

    def peak(loss) -> int:
        with FakeTensorMode(), LiveBytes() as found:
            x = torch.empty(4096, 1024, dtype=dtype, requires_grad=True)
            weight = torch.empty(151_936, 1024, dtype=dtype, requires_grad=True)
            loss(x, weight, torch.zeros(4096, dtype=torch.int64)).backward()
        return found.peak

    whole = peak(lambda x, weight, labels: token_loss(linear(x, weight)[None], labels[None]))
    fused = peak(lambda x, w, labels: head.summed_loss(x, w, None, labels)[0] / 4096)
    assert whole > 2 * 4 * 4096 * 151_936 and fused <= whole / 4


def test_no_objective_of_the_table_needs_the_logits():
    assert all(settings.loss is Settings.loss for settings in OBJECTIVES.values())
