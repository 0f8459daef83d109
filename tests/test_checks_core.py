"""The core of minimamba.checks: a stranger's code, and what the message says about it."""

import _thread
import contextlib
import threading
import time

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from minimamba.checks import CheckFailed, _compare, _guard
from minimamba.checks import discretization as check
from minimamba.checks._core import Case, Exercise, Mistake
from minimamba.checks._help import helpers


def sequences():
    for length in (1, 2, 3, 4, 7):
        for dtype in (torch.float64, torch.float32):
            x = torch.randn(2, length, generator=torch.Generator().manual_seed(length)).to(dtype)
            yield Case(f"{length} steps", x=x)


def running_sum(x):
    return x.cumsum(1)


exercise = Exercise(
    name="running_sum",
    asks="the sum up to each step",
    formula="Asked is h_t = h_{t-1} + x_t.",
    see="07 §1",
    reference=running_sum,
    inputs=sequences,
    mistakes=(Mistake("the sum over the wrong axis", lambda x: x.cumsum(0), "Time is axis 1."),),
    hints=("one", "two", "three"),
    sizes={"L": ("x", 1)},
    seconds=1,
)


def rejected(answer, exercise=exercise):
    with pytest.raises(CheckFailed) as failed:
        exercise(answer)
    return failed.value


def test_a_right_answer_prints_one_line(capsys):
    exercise(lambda anything: anything.flip(1).cumsum(1).flip(1) * 0 + anything.cumsum(1))
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "10 inputs in float64 and float32, from 1 steps to 7 steps" in line


def test_a_known_mistake_is_named_with_its_section():
    failed = rejected(lambda x: x + torch.cat([torch.zeros_like(x[:1]), x[:1]]))
    assert failed.mistake == "the sum over the wrong axis"
    assert "This is what you get with the sum over the wrong axis." in str(failed)
    assert "Time is axis 1. Asked is h_t = h_{t-1} + x_t. See chapter 07 §1." in str(failed)
    assert failed._render_traceback_() == str(failed).splitlines()


@pytest.mark.parametrize(
    "answer, mistake, words",
    [
        (lambda x: -x.cumsum(1), "sign", "opposite sign"),
        (lambda x: 3 * x.cumsum(1), "factor", "3 times what it should be"),
        (lambda x: x.cumsum(1).flip(1), "reversed", "reversed order along axis 1"),
        (lambda x: x.cumsum(1).mT, "shape", "expected (2, 1), got (1, 2)"),
        (lambda x: x.cumsum(1).float(), "dtype", "expected torch.float64, got torch.float32"),
        (lambda x: x.cumsum(1).numpy(), "NumPy", "NumPy array"),
        (lambda x: None, "type", "is there a return?"),
        (lambda x: (x, x), "count", "got 2 values"),
        (lambda x: x.cumsum(1) / 0, "not_finite", "NaN or infinite"),
        (lambda x: torch.nn.functional.pad(x.cumsum(1), (1, 0))[:, :-1], "shifted", "one step late along axis 1"),
        (lambda x: x.nosuch, "raises", "has no attribute 'nosuch'"),
        (lambda x: x.mul_(2).cumsum(1) / 2, "changes its input", "changes its argument x"),
        (lambda x: exit(), "raises", "SystemExit"),
        (torch.zeros(3), "type", "Write check.running_sum(f), not f(...)"),
        (..., "not written", "is not written yet"),
    ],
)
def test_other_mistakes_are_narrowed_down(answer, mistake, words):
    failed = rejected(answer)
    assert failed.mistake == mistake and words in str(failed), failed


def test_the_line_that_raised_is_shown():
    def answer(x):
        y = x + 1
        return y.reshape(17)

    assert "return y.reshape(17)" in str(rejected(answer))


def test_the_inputs_that_fail_are_told():
    cases = {
        "only where L is odd": lambda x: x.cumsum(1) + x.shape[1] % 2,
        "only where L > 4": lambda x: x.cumsum(1) + (x.shape[1] > 4),
        "only where L = 1": lambda x: x.cumsum(1) + (x.shape[1] == 1),
        "only where L = 3": lambda x: x.cumsum(1) + (x.shape[1] == 3),
        "only where dtype = float32": lambda x: x.cumsum(1) + (x.dtype == torch.float32),
    }
    for words, answer in cases.items():
        assert words in str(rejected(answer))
    first_only = lambda x: torch.cat([x[:, :1] + 1, x.cumsum(1)[:, 1:]], 1)
    assert "Only the first entry along axis 1" in str(rejected(first_only))
    last_only = lambda x: torch.cat([x.cumsum(1)[:, :-1], x[:, :1] + 9], 1)
    assert "Only the last entry along axis 1" in str(rejected(last_only))


def test_a_view_is_accepted_and_said(capsys):
    same = Exercise(**{**vars(exercise), "reference": lambda x: x.clone(), "mistakes": ()})
    same(lambda x: x.view(x.shape))
    assert "shares memory with x" in capsys.readouterr().out


def test_a_result_that_depends_on_earlier_calls_is_noticed():
    seen = []

    def answer(x, seen=seen):
        seen.append(x)
        return x.cumsum(1) + (len(seen) > 10)

    assert rejected(answer).mistake == "remembers"


def loop_for_ever(x):
    while True:
        pass


def swallow_everything(x):
    end = time.monotonic() + 4
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


@pytest.mark.parametrize("answer", [loop_for_ever, swallow_everything, lambda x: time.sleep(30)])
def test_what_never_returns_is_stopped_and_leaves_nothing_behind(answer):
    threads, start = threading.active_count(), time.monotonic()
    assert rejected(answer).mistake == "time"
    assert time.monotonic() - start < 4
    assert threading.active_count() == threads
    time.sleep(0.05)  # a late signal would come now


def test_without_the_main_thread_there_is_no_limit():
    results = []
    thread = threading.Thread(target=lambda: results.append(exercise(running_sum)))
    thread.start()
    thread.join()
    assert results == [None]


def test_ctrl_c_stays_ctrl_c():
    def answer(x):
        _thread.interrupt_main()
        while True:
            pass

    with pytest.raises(KeyboardInterrupt):
        exercise(answer)
    with pytest.raises(KeyboardInterrupt), _guard.time_limit(5):
        raise KeyboardInterrupt


def test_the_students_random_numbers_are_left_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    exercise(running_sum)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_coincidence_names_nothing():
    """Right for a mistake on one input, wrong in another way on the next: the mistake is not named."""
    answer = lambda x: x.cumsum(0) if x.shape[1] == 2 else x.cumsum(1) + 1
    assert rejected(answer).mistake != "the sum over the wrong axis"


def test_verify_takes_a_sentence_or_a_mistake(capsys):
    def verify(use, x):
        y = use()
        if y.shape != x.shape:
            return "The shape changed."
        if not torch.equal(y.sort().values, x.sort().values):
            return Mistake("values that were not there", None, "A permutation only moves values.")

    shuffle = Exercise(**{**vars(exercise), "verify": verify})
    shuffle(lambda x: x[:, torch.randperm(x.shape[1])])
    assert "right" in capsys.readouterr().out
    assert "The shape changed." in str(rejected(lambda x: x[:1], shuffle))
    assert rejected(lambda x: x + 1, shuffle).mistake == "values that were not there"
    assert rejected(lambda x: x.nosuch, shuffle).mistake == "raises"
    assert rejected(lambda x: x.mul_(1.5), shuffle).mistake == "changes its input"
    assert rejected(loop_for_ever, shuffle).mistake == "time"


def test_poison_is_read_and_guarded():
    x = _guard.poisoned(torch.arange(6.0).view(2, 3), margin=8)
    assert x.is_contiguous() and torch.equal(x, torch.arange(6.0).view(2, 3))
    around = x.as_strided((8 + 6 + 8,), (1,), 0)
    assert around[:8].isnan().all() and around[14:].isnan().all()
    assert torch.equal(_guard.clean(x), x)
    around[14] = 0
    with pytest.raises(_guard.WroteOutside):
        _guard.clean(x)
    assert _guard.poisoned(torch.arange(3), margin=2).as_strided((2,), (1,), 0)[0] == torch.iinfo(torch.int64).min


@triton.jit
def doubling_kernel(x_ptr, y_ptr, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + at, mask=inside), mask=inside)


@triton.jit
def unmasked_store(x_ptr, y_ptr, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + at, mask=at < length))


@triton.jit
def tail_summed(x_ptr, y_ptr, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, 2 * x + 0 * tl.sum(x), mask=at < length)


@triton.jit
def mask_too_long(x_ptr, y_ptr, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at <= length
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + at, mask=inside), mask=inside)


@triton.jit
def kernel_that_raises(x_ptr, y_ptr, length, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.nosuch(x_ptr))


@triton.jit
def stub_kernel(x_ptr, y_ptr, length, BLOCK: tl.constexpr):
    raise NotImplementedError


def launch(kernel, x):
    if not _guard.is_kernel(kernel):
        return kernel(x)
    y = _guard.unwritten(x)
    kernel[((len(x) + 7) // 8,)](_guard.poisoned(x), y, len(x), BLOCK=8)
    return _guard.clean(y)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels on CPU tensors need Triton's interpreter")
def test_a_kernel_runs_on_poisoned_buffers(capsys):
    vectors = lambda: (Case(f"{n} entries", x=torch.arange(1.0, n + 1)) for n in (8, 1, 13))
    doubling = Exercise(
        name="doubling", asks="y = 2 x", formula="Asked is y = 2 x.", see="10 §1", reference=lambda x: 2 * x,
        inputs=vectors, kind="kernel", run=launch, hints=("", "", ""), sizes={"n": ("x", 0)},
        mistakes=(Mistake("y = x", lambda x: x.clone()),),
    )  # fmt: skip
    doubling(doubling_kernel)
    assert "right" in capsys.readouterr().out
    failed = rejected(unmasked_store, doubling)
    assert failed.mistake == "writes outside" and "(1 entries)" in str(failed)
    assert "wrote outside" in str(rejected(mask_too_long, doubling))
    assert "nosuch" in str(rejected(kernel_that_raises, doubling))
    assert rejected(tail_summed, doubling).mistake == "not_finite"
    assert rejected(stub_kernel, doubling).mistake == "not written"
    assert rejected(lambda x: 2 * x, doubling).mistake == "type"


def test_numbers_are_compared_as_numbers():
    assert _compare.complaint(3, 3.0, ("n",), None) is None
    assert _compare.complaint(3, 3.5, ("n",), None)[0] == "value"
    assert _compare.complaint(0.5, torch.tensor(0.5), ("p",), None) is None
    assert _compare.complaint(0.5, [0.5], ("p",), None)[0] == "count"
    assert _compare.complaint(True, False, ("p",), None)[0] == "value"
    assert _compare.complaint("a", "b", ("p",), None)[0] == "value"
    nan = torch.tensor([torch.nan, 1.0])
    assert _compare.complaint(nan, nan.clone(), ("x",), None) is None
    assert _compare.complaint(torch.ones(2), nan, ("x",), None)[0] == "value"
    infinite = torch.tensor([-torch.inf, 1.0])
    assert _compare.complaint(infinite, infinite.clone(), ("x",), None) is None


def test_hints_come_one_after_the_other(capsys):
    hint, _ = helpers(exercise)
    for _ in range(4):
        hint("running_sum")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["Hint 1 of 3: one", "Hint 2 of 3: two", "Hint 3 of 3: three", "Hint 3 of 3: three"]
    with pytest.raises(ValueError, match="name: expected one of 'running_sum'"):
        hint("nosuch")


def test_a_picture_shows_the_target_and_yours():
    import matplotlib

    matplotlib.use("Agg")
    figure = check.picture("zoh", lambda A, B, delta: (torch.exp(delta * A), delta * B))
    assert [axis.get_title() for axis in figure.axes[:2]] == ["A_bar: target", "A_bar: yours (2, 2)"]
    matplotlib.pyplot.close(figure)
    with pytest.raises(ValueError, match="has no picture"):
        check.picture("twice", 1)


def test_the_reference_of_the_trapezoid_has_order_2():
    """Against h(t) for x(t) = sin 3t, from a larger system."""
    A = torch.tensor([[0.0, 1.0], [-4.0, -0.5]], dtype=torch.float64)
    B, h = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    system = torch.zeros(4, 4, dtype=torch.float64)
    system[:2, :2], system[:2, 2], system[2, 3], system[3, 2] = A, B, 3, -3
    exact = (torch.matrix_exp(4 * system) @ torch.tensor([1.0, 0, 0, 1], dtype=torch.float64))[:2]
    errors = []
    for steps in (256, 512):
        x = torch.sin(3 * 4 / steps * torch.arange(steps + 1, dtype=torch.float64))
        errors.append((check.trapezoid_states(A, B, 4 / steps, x, h)[-1] - exact).norm().item())
    assert 3.9 < errors[0] / errors[1] < 4.1


def test_the_value_of_twice():
    z = torch.tensor(check.Z_TWICE, dtype=torch.float64)
    assert abs(torch.expm1(z) / z - 0.5) < 1e-14


DOUBLED = {
    "asks": "2 x",
    "formula": "Asked is 2 x.",
    "see": "00 §0",
    "mistakes": (),
    "hints": ("a", "b", "c"),
    "results": ("y",),
}


def said(check, answer):
    with pytest.raises(CheckFailed) as failed:
        check(answer)
    return str(failed.value)


def test_answers_that_no_comparison_expects_are_refused_in_words():
    def vectors():
        yield Case("two numbers", x=torch.tensor([1.0, -3.0], dtype=torch.float64))

    double = Exercise(name="double", reference=lambda x: 2 * x, inputs=vectors, **DOUBLED)
    message = said(double, lambda x: [2 * value for value in x])
    assert "Expected one result, got 2 values in a tuple or list. torch.stack makes one tensor of many." in message
    assert "got a sparse tensor" in said(double, lambda x: (2 * x).to_sparse())
    assert "got a tensor without numbers" in said(double, lambda x: x.to("meta"))
    assert "everywhere" not in said(double, lambda x: 1e30 * x * x)  # not a factor, large as it is
    for strange in ({"y": torch.ones(2)}, 10**400, np.array([None, "a"]), (torch.ones(2), [None]), (), {1, 2}, ["a"]):
        assert "y" in said(double, lambda x, strange=strange: strange)


def test_a_value_of_a_strange_type_is_refused_in_words():
    three = Exercise(name="three", kind="value", reference=3.0, inputs=None, **DOUBLED)
    for strange in ((), [2.0, 3.0], 10**400, 1 + 1j, np.array([None, 1]), {"y": 3.0}, torch.zeros(2)):
        assert "three: not right yet" in said(three, strange)
    assert "too large" in said(three, 10**400)


def test_a_number_that_is_wrong_has_no_right_shape():
    def numbers():
        yield Case("one number", x=2.0)
        yield Case("another", x=5.0)

    assert "y: wrong value." in said(Exercise(name="double", reference=lambda x: 2 * x, inputs=numbers, **DOUBLED), abs)
