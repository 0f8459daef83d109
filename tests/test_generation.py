"""Chapter 13's sampling: filters against transformers, batches against single texts, memory against length."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimamba import generation
from minimamba.language_model import MambaConfig, MambaLM

SMALL = {"vocab_size": 13, "d_model": 8, "n_layer": 2, "d_state": 3}


def make(device=None, **options):
    """A model whose next token depends on much: fresh ones repeat themselves."""
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(**(SMALL | options)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        model.backbone.norm_f.weight.mul_(3)
    return model.to(device).eval()


def draw(*shape, seed=1, vocab_size=13):
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def greedy(model, prompt, steps):
    """The most probable continuation, the whole text read anew for each token."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


def lists(tokens):
    return [row.tolist() for row in tokens]


# --- the loop ---


def test_greedy_tokens_are_those_of_the_full_pass():
    model, prompts = make(), draw(3, 5)
    expected = [greedy(model, prompt, 12) for prompt in prompts.tolist()]
    assert len({tuple(row) for row in expected}) == 3 and len(set(expected[0])) > 4  # no trivial text
    tokens = model.generate(prompts, 12)
    assert lists(tokens) == expected
    assert all(row.dtype == torch.int64 and row.shape == (12,) for row in tokens)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_a_prompt_of_any_length_is_continued_as_if_it_were_alone(lengths, seed):
    model = make()
    prompts = [draw(length, seed=seed + i) for i, length in enumerate(lengths)]
    assert lists(model.generate(prompts, 6)) == [greedy(model, prompt.tolist(), 6) for prompt in prompts]


def test_prompts_may_be_tensors_lists_or_bytes():
    model = make()
    expected = lists(model.generate(torch.tensor([[1, 2, 3]]), 4))
    for prompts in ([[1, 2, 3]], [torch.tensor([1, 2, 3])], [b"\1\2\3"], ((1, 2, 3),), torch.tensor([[1, 2, 3]]).int()):
        assert lists(model.generate(prompts, 4)) == expected


def test_a_long_prompt_is_read_in_pieces(monkeypatch):
    model, prompts = make(), [draw(23), draw(3), draw(8)]
    expected = lists(model.generate(prompts, 5))
    monkeypatch.setattr(generation, "PIECE", 5)
    lengths = []
    model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    assert lists(model.generate(prompts, 5)) == expected
    assert lengths == [5, 5, 5, 5, 3, 1, 1, 1, 1]  # and no step after the last token


def test_a_stream_yields_each_step_as_it_is_made():
    model, steps = make(), []
    model.register_forward_pre_hook(lambda *_: steps.append(None))
    stream = model.stream(draw(2, 4), 3)
    assert steps == []
    tokens = []
    for count, token in enumerate(stream, start=1):
        assert token.shape == (2,) and token.dtype == torch.int64 and len(steps) == count
        tokens.append(token)
    assert torch.equal(torch.stack(tokens, dim=1), torch.stack(model.generate(draw(2, 4), 3)))


def test_text_ends_after_a_stop_sequence():
    model, prompts = make(), draw(3, 5)
    whole = lists(model.generate(prompts, 20))
    stop = [whole[0][4:6], whole[1][9]]

    def cut(row):
        for i in range(len(row)):
            if row[i] == stop[1] or (i > 0 and row[i - 1 : i + 1] == stop[0]):
                return row[: i + 1]
        return row

    expected = [cut(row) for row in whole]
    assert len({len(row) for row in expected}) > 1
    assert lists(model.generate(prompts, 20, stop=stop)) == expected
    steps = list(model.stream(prompts, 20, stop=stop))
    assert len(steps) == max(map(len, expected))
    for i, row in enumerate(expected):
        assert [int(step[i]) for step in steps] == row + [-1] * (len(steps) - len(row))


def test_a_stop_sequence_does_not_begin_in_the_prompt():
    model = make()
    first, second = model.generate([[1, 2, 3]], 2)[0].tolist()
    assert lists(model.generate([[1, 2, 3]], 2, stop=[[3, first]])) == [[first, second]]
    assert lists(model.generate([[1, 2, 3]], 2, stop=[[first]])) == [[first]]


def test_the_same_seed_gives_the_same_text_and_another_another():
    model, prompts = make(), draw(2, 4)
    sample = lambda seed: lists(model.generate(prompts, 30, temperature=1.0, seed=seed))
    assert sample(5) == sample(5) != sample(6)
    torch.manual_seed(0)
    first = sample(None)
    assert sample(None) != first
    torch.manual_seed(0)
    assert sample(None) == first


def test_generation_leaves_no_trace_in_the_model():
    model, prompts = make(), draw(2, 4)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    torch.manual_seed(3)
    drawn = torch.rand(())
    torch.manual_seed(3)
    model.generate(prompts, 5, temperature=1.0, seed=1)
    assert torch.rand(()) == drawn  # a seed leaves PyTorch's generator alone
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(x.grad is None for x in model.parameters()) and torch.is_grad_enabled()
    next(stream := model.stream(prompts, 5))
    assert torch.is_grad_enabled()
    stream.close()


def test_repetition_penalty_counts_prompt_and_new_tokens_but_no_padding():
    model = make()
    prompts = [[1, 2, 3, 1], [5]]
    for tokens, prompt in zip(model.generate(prompts, 9, repetition_penalty=1e6), prompts, strict=True):
        # Never a token twice, as long as another has a positive logit or all are used.
        text = list(prompt)
        with torch.no_grad():
            for token in tokens.tolist():
                logits = model(torch.tensor([text]))[0, -1]
                for old in set(text):
                    logits[old] = logits[old] / 1e6 if logits[old] > 0 else logits[old] * 1e6
                assert token == int(logits.argmax())
                text.append(token)
        assert len(set(tokens.tolist())) > 4


# --- memory ---


class Held:
    """Counts the bytes of the tensors that are alive between two steps, by way of every result of an operator."""

    def __init__(self):
        self.alive = weakref.WeakValueDictionary()
        held = self

        class Mode(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                for x in result if isinstance(result, tuple) else (result,):
                    if isinstance(x, torch.Tensor):
                        held.alive[id(x)] = x
                return result

        self.mode = Mode()

    def bytes(self):
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.alive.values()}.values())


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2, "stop": [[99, 98, 97]]}])
def test_memory_does_not_grow_with_the_text(options):
    model, held, seen = make(), Held(), []
    with held.mode:
        for _ in model.stream(draw(2, 6), 60, temperature=1.0, top_k=5, top_p=0.9, min_p=0.01, seed=0, **options):
            seen.append(held.bytes())
    state = sum(x.nbytes for layer in model.allocate_cache(2) for x in layer)
    assert seen[2] == seen[59]
    assert state < seen[59] < 2 * state + 4096, (seen, state)


def test_a_cache_has_the_same_size_for_any_length():
    model = make()
    cache = model.allocate_cache(1)
    places = [x.data_ptr() for layer in cache for x in layer]
    with torch.no_grad():
        model(draw(1, 500), cache)
        for _ in range(5):
            model(draw(1, 1), cache)
    assert places == [x.data_ptr() for layer in cache for x in layer]


# --- the filters ---


@pytest.fixture(scope="module")
def process():
    return pytest.importorskip("transformers.generation.logits_process")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("value", [1, 2, 7, 50, 80])
def test_top_k_equals_transformers(process, seed, value):
    logits = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(seed))
    expected = process.TopKLogitsWarper(value)(None, logits)
    assert torch.equal(generation.keep_top_k(logits, value), expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("value", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_and_min_p_equal_transformers(process, seed, value):
    logits = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(generation.keep_top_p(logits, value), process.TopPLogitsWarper(value)(None, logits))
    assert torch.equal(generation.keep_min_p(logits, value), process.MinPLogitsWarper(value)(None, logits))


@pytest.mark.parametrize("value", [0.5, 1.0, 1.3])
def test_repetition_penalty_equals_transformers(process, value):
    logits, tokens = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)), draw(3, 20, vocab_size=50)
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter(1, tokens, True)
    expected = process.RepetitionPenaltyLogitsProcessor(value)(tokens, logits)
    assert torch.equal(generation.penalize_repetition(logits, seen, value), expected)


def test_filters_follow_one_another_as_in_transformers(process, monkeypatch):
    logits = 4 * torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    expected = logits
    for warper in (
        process.TemperatureLogitsWarper(1.7), process.TopKLogitsWarper(40), process.TopPLogitsWarper(0.8),
        process.MinPLogitsWarper(0.1),
    ):  # fmt: skip
        expected = warper(None, expected)
    drawn_from = []
    monkeypatch.setattr(torch, "multinomial", lambda p, *_, **__: drawn_from.append(p) or p.argmax(-1, keepdim=True))
    generation.choose(logits, temperature=1.7, top_k=40, top_p=0.8, min_p=0.1)
    assert torch.equal(drawn_from[0], expected.softmax(-1))
    assert 1 < (drawn_from[0] > 0).sum(-1).float().mean() < 40


def test_top_p_keeps_the_token_that_reaches_the_sum():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()[[2, 0, 3, 1]]
    kept = lambda p: sorted(
        generation.keep_top_p(logits, p).softmax(-1)[generation.keep_top_p(logits, p) > -99].tolist()
    )
    assert kept(0.4) == [1]
    assert kept(0.6) == pytest.approx([1 / 3, 2 / 3])
    assert kept(0.75 + 1e-4) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert len(kept(1.0)) == 4


def test_filters_always_leave_the_most_probable_token():
    logits = torch.randn(20, 9, generator=torch.Generator().manual_seed(0))
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert torch.equal(generation.choose(logits, temperature=2.0, **options), logits.argmax(-1))


def test_temperature_sharpens_and_zero_is_the_most_probable():
    logits = torch.tensor([[1.0, 2.0, 0.0]]).expand(20000, 3)
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0, 3.0):
        tokens = generation.choose(logits, temperature=temperature, generator=generator)
        shares = torch.bincount(tokens, minlength=3) / 20000
        assert (shares - (logits[0] / temperature).softmax(-1)).abs().max() < 0.015
    assert generation.choose(logits, temperature=0, top_k=3).eq(1).all()


# --- on a GPU: one step is a CUDA graph ---


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_the_graph_gives_the_same_text_as_the_loop(monkeypatch, autocast):
    model, prompts = make("cuda", d_model=32, n_layer=3), [draw(7), draw(3), draw(1)]
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(1), replay(self)))
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        graphed = lists(model.generate(prompts, 20))
        assert len(replays) == 19
        monkeypatch.setattr(generation, "_GraphedStep", generation._Step)
        assert lists(model.generate(prompts, 20)) == graphed
        assert len(replays) == 19


@pytest.mark.gpu
def test_the_graph_draws_anew_at_each_step_and_holds_constant_memory():
    model, used = make("cuda"), []
    tokens = []
    for step in model.stream(draw(2, 4), 200, temperature=3.0, top_p=0.9, repetition_penalty=1.1, seed=3):
        tokens.append(step.cpu())
        used.append(torch.cuda.memory_allocated())
    assert used[10] == used[-1]
    assert len({tuple(step.tolist()) for step in tokens}) > 10
    again = model.generate(draw(2, 4), 200, temperature=3.0, top_p=0.9, repetition_penalty=1.1, seed=3)
    assert torch.equal(torch.stack(tokens, dim=1), torch.stack(again).cpu())


def test_the_loop_of_the_graph_on_a_cpu(monkeypatch):
    """The twin: the same loop, with a step that keeps its input and output in place as a graph does."""

    class InPlace(generation._Step):
        def __init__(self, model, cache):
            super().__init__(model, cache)
            self.tokens, self.logits = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 13)
            assert all(state.abs().max() == 0 for layer in cache for state in layer)

        def __call__(self, tokens):
            self.tokens.copy_(tokens)
            return self.logits.copy_(super().__call__(self.tokens))

    options = {"temperature": 0.8, "top_k": 9, "repetition_penalty": 1.1, "seed": 4}
    model, prompts = make(), [draw(7), draw(3), draw(1)]
    expected = lists(model.generate(prompts, 15, **options))
    monkeypatch.setattr(generation, "_Step", InPlace)
    assert lists(model.generate(prompts, 15, **options)) == expected


# --- bad arguments ---


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), ValueError, r"prompts: expected shape \(B, L\) or a list of sequences"),
        ([], ValueError, "prompts: expected at least one, got none"),
        ([[1], []], ValueError, "prompts: expected at least one token in each, got none at 1"),
        (b"abc", TypeError, "prompts: expected sequences of token ids"),
        ("abc", TypeError, "prompts: expected sequences of token ids"),
        (3, TypeError, "prompts: expected sequences of token ids"),
        ([[1, 2], [0.5]], TypeError, "prompts: expected integers, got torch.float32 at 1"),
        ([[True]], TypeError, "prompts: expected integers, got torch.bool at 0"),
        ([[[1]]], TypeError, r"prompts: expected sequences of token ids, got shape \(1, 1\) at 0"),
        ([[1, 13]], ValueError, "prompts: expected tokens from 0 to 12, got others at 0"),
        ([[1], [-1]], ValueError, "prompts: expected tokens from 0 to 12, got others at 1"),
    ],
)
def test_wrong_prompts_are_named(prompts, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make().stream(prompts, 3)  # before the first step is asked for


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected at least 1, got 0"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens: expected an int"),
        ({"temperature": -0.1}, ValueError, r"temperature: expected a number in \[0, inf\), got -0.1"),
        ({"temperature": float("nan")}, ValueError, "temperature: "),
        ({"temperature": "hot"}, TypeError, "temperature: expected a number, got str"),
        ({"top_k": 0}, ValueError, "top_k: expected at least 1, got 0"),
        ({"top_k": 0.9}, TypeError, "top_k: expected an int, got float"),
        ({"top_p": 0.0}, ValueError, r"top_p: expected a number in \(0, 1\], got 0.0"),
        ({"top_p": 90}, ValueError, r"top_p: expected a number in \(0, 1\], got 90"),
        ({"min_p": 1.01}, ValueError, r"min_p: expected a number in \[0, 1\], got 1.01"),
        ({"repetition_penalty": 0}, ValueError, r"repetition_penalty: expected a number in \(0, inf\), got 0"),
        ({"stop": 3}, TypeError, "stop: expected tokens or sequences of tokens"),
        ({"stop": [[]]}, ValueError, "stop: expected at least one token in each sequence"),
        ({"seed": 1.5}, TypeError, "seed: expected an int or None, got float"),
    ],
)
def test_a_wrong_option_is_named(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make().stream([[1]], **({"max_new_tokens": 3} | options))
