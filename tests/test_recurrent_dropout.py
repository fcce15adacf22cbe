"""Dropout and activity penalties after recurrent and attention modules: which dimension holds the samples, packed sequences."""

from __future__ import annotations

import pytest
import torch
from helpers import Classifier, fit
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, unpack_sequence
from torch.testing import assert_close

from lightning_reg import ActivityPenalty, DropoutInjection, Linear
from lightning_reg.functional import Rate, activity_penalty, dropout, inject_dropout, packed_dropout

LENGTHS = [2, 7, 5, 7, 1]


def ones(batch_first=False, samples=64, steps=6):
    return torch.ones(*((samples, steps) if batch_first else (steps, samples)), 8)


def masks(module, *inputs, p=0.5, **how):
    """Return what the output of a module was multiplied by, and all that the module returned."""
    torch.manual_seed(0)
    plain = module(*inputs)
    (injected,) = inject_dropout({"module": module}, p, **how)
    dropped = module(*inputs)
    injected.remove()
    main = [output if isinstance(output, torch.Tensor) else output[0] for output in (plain, dropped)]
    data = [output.data for output in main]
    return data[1] / data[0], dropped


def is_mask(mask, p=0.5):
    return set(mask.flatten().round(decimals=4).tolist()) == {0.0, round(1 / (1 - p), 4)}


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [False, True])
def test_whole_samples_of_a_recurrent_module(kind, batch_first):
    mask, _ = masks(kind(8, 4, batch_first=batch_first), ones(batch_first), samplewise=True)
    mask = mask if batch_first else mask.transpose(0, 1)
    assert is_mask(mask)
    assert (mask == mask[:, :1, :1]).all()  # one draw for each of the 64 samples
    assert 16 < (mask[:, 0, 0] == 0).sum() < 48


@pytest.mark.parametrize("batch_first", [False, True])
def test_whole_samples_of_attention(batch_first):
    x = torch.randn_like(ones(batch_first))
    for module in (
        nn.MultiheadAttention(8, 2, batch_first=batch_first),
        nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=batch_first),
    ):
        inputs = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
        mask, _ = masks(module, *inputs, samplewise=True)
        mask = mask if batch_first else mask.transpose(0, 1)
        assert_close(mask, mask[:, :1, :1].expand_as(mask))
        assert 16 < (mask[:, 0, 0] == 0).sum() < 48


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.LSTM(8, 4), [torch.ones(6, 8)]),
        (nn.GRU(8, 4, batch_first=True), [torch.ones(6, 8)]),
        (nn.MultiheadAttention(8, 2), [torch.ones(6, 8)] * 3),
        (nn.LSTMCell(8, 4), [torch.ones(8)]),
        (nn.GRUCell(8, 4), [torch.ones(8)]),
    ],
)
def test_a_single_sample_is_dropped_as_a_whole(module, inputs):
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        (injected,) = inject_dropout({"module": module}, 0.5, samplewise=True)
        output = module(*inputs)
        injected.remove()
        output = output[0] if isinstance(output, tuple) else output
        seen.add((output == 0).float().mean().item())
    assert seen == {0.0, 1.0}


def test_one_mask_for_all_time_steps_of_a_sample():
    """Locked dropout: the draws differ between samples and features, and not between time steps."""
    for batch_first in (False, True):
        mask, _ = masks(nn.LSTM(8, 16, batch_first=batch_first), ones(batch_first), shared_dims=[1 if batch_first else 0])
        mask = mask if batch_first else mask.transpose(0, 1)
        assert is_mask(mask)
        assert (mask == mask[:, :1]).all()
        first = mask[:, 0] == 0
        assert abs(first.float().mean() - 0.5) < 5 * (0.25 / first.numel()) ** 0.5
        assert not (first == first[:1]).all()
        assert not (first == first[:, :1]).all()


@pytest.mark.parametrize("p", [0.3, torch.tensor(0.3)])
@pytest.mark.parametrize("shared", [(0,), (1,), (-1,), (0, 2), [0, 1, 2]])
def test_shared_dimensions_of_the_function(p, shared):
    torch.manual_seed(0)
    mask = dropout(torch.ones(7, 300, 5), p, shared_dims=shared)
    reduced = mask.amax(tuple(shared), keepdim=True)
    assert torch.equal(mask, reduced.expand_as(mask))
    if reduced.numel() > 100:
        assert abs((reduced == 0).float().mean() - 0.3) < 5 * (0.21 / reduced.numel()) ** 0.5


@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_packed_sequences_lose_single_entries_and_keep_everything_else(kind, enforce_sorted):
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    packed = pack_sequence([torch.ones(n, 8) for n in lengths], enforce_sorted=enforce_sorted)
    module = kind(8, 200)
    mask, (output, states) = masks(module, packed)
    assert is_mask(mask)
    assert abs((mask == 0).float().mean() - 0.5) < 5 * (0.25 / mask.numel()) ** 0.5
    plain, plain_states = module(packed)
    assert_close(states, plain_states, rtol=0.0, atol=0.0)
    for part in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        ours, theirs = getattr(output, part), getattr(plain, part)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    torch.manual_seed(1)
    by_hand = nn.functional.dropout(plain.data, 0.5)
    torch.manual_seed(1)
    (injected,) = inject_dropout({"module": module}, 0.5)
    assert torch.equal(module(packed)[0].data, by_hand)  # torch's own draws
    injected.remove()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("p", [0.5, torch.tensor(0.5)])
@pytest.mark.parametrize("how", ["samplewise", "time", "samples", "features", "all but features"])
def test_packed_sequences_share_masks_as_padded_ones_do(batch_first, p, how):
    """Of 64 sequences of lengths 1 to 7, padded again: the dimensions (samples, time, features) of each mask."""
    shape = {"samplewise": (1, 2), "time": (1,), "samples": (0,), "features": (2,), "all but features": (0, 1)}[how]
    dims = [dim if batch_first or dim == 2 else 1 - dim for dim in shape]
    packed = pack_sequence([torch.ones(1 + n % 7, 16) for n in range(64)], enforce_sorted=False)
    torch.manual_seed(0)
    dropped = packed_dropout(packed, p, shared_dims=dims, batch_first=batch_first)
    padded, lengths = pad_packed_sequence(dropped, batch_first=True, padding_value=-1.0)
    assert lengths.tolist() == [1 + n % 7 for n in range(64)]
    expected = padded.amax(shape, keepdim=True).expand_as(padded)
    assert torch.equal(padded, torch.where(padded < 0, padded, expected))
    for other in {0, 1, 2} - set(shape):  # and along the others it is not
        shared_too = padded.amax((*shape, other), keepdim=True).expand_as(padded)
        assert not torch.equal(padded, torch.where(padded < 0, padded, shared_too))


@pytest.mark.parametrize("batch_first", [False, True])
def test_whole_packed_samples_behind_a_module(batch_first):
    packed = pack_sequence([torch.ones(1 + n % 7, 8) for n in range(64)], enforce_sorted=False)
    mask, (output, _) = masks(nn.LSTM(8, 4, batch_first=batch_first), packed, samplewise=True)
    samples = [sequence.flatten() for sequence in unpack_sequence(output._replace(data=mask))]
    assert all((sample == sample[0]).all() for sample in samples)
    assert 16 < sum(sample[0].item() == 0 for sample in samples) < 48
    assert packed_dropout(packed, 0.0) is packed


@pytest.mark.parametrize("how", [{"shared_dims": [1]}, {"samplewise": True}])
def test_compiled_code_shares_masks_with_one_graph_for_all_rates(how):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer, rate = nn.Identity(), Rate(0.5)
    inject_dropout({"layer": layer}, rate, **how)
    compiled = torch.compile(layer, backend=counter)
    for p in (0.0, 0.2, 0.5, 0.9):
        rate.set(p)
        mask = compiled(torch.ones(200, 5, 3))
        dims = (1, 2) if "samplewise" in how else (1,)
        assert torch.equal(mask, mask.amax(dims, keepdim=True).expand_as(mask))
        assert abs((mask[:, 0] == 0).float().mean() - p) < 5 * (p * (1 - p) / 200) ** 0.5 + 1e-6
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_cell_loses_its_output_and_keeps_its_memory():
    cell = nn.LSTMCell(8, 200)
    _, (h, c) = masks(cell, torch.ones(16, 8))
    assert abs((h == 0).float().mean() - 0.5) < 5 * (0.25 / h.numel()) ** 0.5
    assert_close(c, cell(torch.ones(16, 8))[1], rtol=0.0, atol=0.0)


class Reads(Classifier):
    """The model behind an LSTM that reads the rows of an image; half of the images are shorter."""

    def __init__(self, packs=True, batch_first=True, layer=None):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.packs = layer or nn.LSTM(8, 64, batch_first=batch_first), packs
        self.net[3].p = 0.0

    def training_step(self, batch, batch_idx):
        rows = batch[0].view(-1, 8, 8)
        rows = rows if self.rnn.batch_first else rows.transpose(0, 1)
        if self.packs:
            lengths = [8, 5] * (len(batch[0]) // 2)
            rows = pack_padded_sequence(rows, lengths, batch_first=self.rnn.batch_first, enforce_sorted=False)
        output, _ = self.rnn(rows)
        if self.packs:
            output, _ = pad_packed_sequence(output, batch_first=self.rnn.batch_first)
        self.output = output
        last = output[:, -1] if self.rnn.batch_first else output[-1]
        return super().training_step((last, batch[1]), batch_idx)


@pytest.mark.parametrize("how", [{}, {"samplewise": True}, {"shared_dims": [1]}])
@pytest.mark.parametrize("p", [0.5, Linear(0.1, 0.5)])
def test_an_lstm_of_packed_sequences_is_trained_with_dropout(p, how):
    model = fit([DropoutInjection(p, after="LSTM", **how)], Reads(), max_epochs=1)
    assert (model.output[::2] == 0).any()
    assert list(model.state_dict()) == list(Reads().state_dict())
    assert not model.rnn._forward_hooks


@pytest.mark.parametrize(
    ("module", "inputs", "how", "message"),
    [
        (nn.Linear(8, 4), [torch.ones(3, 8)], {"shared_dims": [2]}, r"shared_dims has the dimension 2, .* has shape \(3, 4\)"),
        (nn.Linear(8, 4), [torch.ones(3, 8)], {"shared_dims": [-3]}, r"shared_dims has the dimension -3"),
        (
            nn.LSTM(8, 4),
            [pack_sequence([torch.ones(3, 8)])],
            {"shared_dims": [3]},
            r"\(LSTM\): shared_dims has the dimension 3, but the output is a PackedSequence with data of shape \(3, 4\)",
        ),
        (
            nn.LSTM(8, 4),
            [pack_sequence([torch.ones(3, 8)])],
            {"channelwise": True},
            "channels are in dimension 1, but the output is a PackedSequence",
        ),
    ],
)
def test_outputs_without_the_dimensions_are_refused(module, inputs, how, message):
    with pytest.raises(TypeError, match=message):
        masks(module, *inputs, **how)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shared_dims": 1}, TypeError, r"DropoutInjection: shared_dims must be a list of dimensions, as in .*=\[1\], got 1"),
        ({"shared_dims": ["time"]}, TypeError, "shared_dims must be a list of dimensions"),
        ({"shared_dims": [True]}, TypeError, "shared_dims must be a list of dimensions"),
        (
            {"shared_dims": [1], "samplewise": True},
            ValueError,
            r"set only one of channelwise, samplewise, and shared_dims, got samplewise=True and shared_dims=\[1\]",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        DropoutInjection(0.1, after="LSTM", **arguments)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_activity_of_an_lstm_is_the_mean_over_samples(p, packs, batch_first):
    """The first term that it adds to the loss; padding is 0 and adds nothing."""
    seen = []

    class Watched(ActivityPenalty):
        def loss_term(self, optimizer, last):
            seen.append((super().loss_term(optimizer, last)[0].detach(), model.output.detach()))

    model = Reads(packs, batch_first)
    fit([Watched(0.1, modules="LSTM", p=p)], model, max_epochs=1)
    for value, output in seen:
        by_sample = (output if batch_first else output.transpose(0, 1)).flatten(1)
        assert_close(value, (by_sample.abs().sum(1) if p == 1 else by_sample.square().sum(1) / 2).mean())


def test_the_activity_of_attention_and_of_a_cell_is_that_of_the_output():
    class Both(Classifier):
        def __init__(self):
            super().__init__()
            self.attention, self.cell = nn.MultiheadAttention(8, 2), nn.LSTMCell(64, 64)

        def training_step(self, batch, batch_idx):
            x = batch[0].view(-1, 8, 8).transpose(0, 1)
            self.outputs = self.attention(x, x, x)[0], self.cell(batch[0])[0]
            return super().training_step(batch, batch_idx) + 0 * sum(output.sum() for output in self.outputs)

    seen = []

    class Watched(ActivityPenalty):
        def loss_term(self, optimizer, last):
            seen.append(super().loss_term(optimizer, last)[0].detach())

    model = fit([Watched(0.1, modules=["MultiheadAttention", "LSTMCell"])], Both(), max_epochs=1)
    attended, h = model.outputs
    assert_close(seen[-1], (attended.abs().sum((0, 2)).mean() + h.abs().sum(1).mean()).detach())


def test_the_number_of_samples_of_the_function():
    x = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    assert activity_penalty(x) == 3.0
    assert activity_penalty(x, samples=1) == 6.0
