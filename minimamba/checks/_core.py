"""An exercise: what is asked, the inputs that expose mistakes, the mistakes that are known, hints, a picture.

Calling an Exercise with a student's answer prints one line, or raises CheckFailed.
"""

from collections.abc import Callable
from dataclasses import dataclass

from minimamba.checks import _compare
from minimamba.checks._guard import (
    TimeUp,
    WroteOutside,
    as_tuple,
    call,
    causes,
    copied,
    is_kernel,
    raised,
    time_limit,
    torch_only,
)

NOT_WRITTEN = "It is not written yet: put your code in place of `raise NotImplementedError`."


class CheckFailed(AssertionError):
    """The answer is wrong. `mistake` is the name of what was recognised, or None."""

    def __init__(self, message, mistake=None):
        super().__init__(message)
        self.mistake = mistake

    def _render_traceback_(self):
        """What a notebook shows: the message alone."""
        return str(self).splitlines()


class Case:
    """One input: a note that tells what is special about it, and the arguments by name, in the order of the call."""

    def __init__(self, note, /, **arguments):
        self.note, self.arguments = note, arguments


@dataclass(frozen=True)
class Mistake:
    """A known wrong answer. `wrong` is an answer as a student would hand it in; several with one name are variants.

    The message: "This is what you get with {name}.", then `says`, then the exercise's `formula` and
    "See chapter {see}." (by default the exercise's).
    """

    name: str
    wrong: object
    says: str = ""
    see: str = ""


def answer_of(answer, /, **arguments):
    """The default `run`: call the answer with the arguments in their order, whatever the student calls them."""
    return answer(*arguments.values())


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    name       what the check is called: check.zoh has name "zoh"
    asks       what is asked, in a few words
    formula    one sentence, shown with a mistake: "Asked is ..."
    see        the section that explains it: "02 §1"
    reference  a right answer: the library's function, or the value
    inputs     function without arguments that yields Cases from the smallest to the largest; None where the answer
               is a value
    mistakes   the bank of Mistakes
    hints      three, from a nudge to nearly the answer
    results    names of the results, in order
    sizes      {"N": ("A", -1)}: N is the last axis of the argument A. Lets the check say "only where N = 1"
    run        run(answer, **arguments) -> results: how an answer is used, the student's, the reference and the
               mistakes alike. Computes a gradient, launches a kernel, steps through a module
    verify     verify(use, **arguments) -> None, a sentence, or a Mistake: instead of a comparison with `reference`,
               where many answers are right. `use()` runs the answer on the arguments, use(x=...) with some replaced
    kind       "function", "value" or "kernel"
    tolerance  largest error relative to the largest expected entry; by default 1e-9 in float64, 1e-4 in float32
    changes    names of arguments that may be changed
    seconds    time limit of the whole check
    draw       draw(exercise, answer) -> figure for check.picture
    """

    name: str
    asks: str
    formula: str
    see: str
    reference: object
    inputs: Callable | None
    mistakes: tuple
    hints: tuple
    results: tuple = ("result",)
    sizes: dict | None = None
    run: Callable = answer_of
    verify: Callable | None = None
    kind: str = "function"
    tolerance: float | None = None
    changes: tuple = ()
    seconds: float = 20
    draw: Callable | None = None

    def __call__(self, answer):
        self._refuse_other_things(answer)
        cases = self.cases()
        if self.verify:
            self._verify(answer, cases)
            return
        wanted = [self.use(self.reference, case) for case in cases]
        came = self._try(answer, cases)
        complaints = [self._complaint(want, have) for want, have in zip(wanted, came, strict=True)]
        failed = [i for i, problem in enumerate(complaints) if problem]
        if failed:
            self._explain(cases, wanted, came, complaints, failed)
        errors = [
            _compare.distance(want, have)
            for a, b in zip(wanted, came, strict=True)
            for want, have in zip(as_tuple(a.value), as_tuple(b.value), strict=True)
            if not isinstance(want, str)
        ]
        shared = sorted({name for have in came for name in have.shared} - set(self.changes))
        note = f" Note: the result shares memory with {', '.join(shared)}." if shared else ""
        error = f"largest error {max(errors):.0e} of the largest entry" if any(errors) else "no error at all"
        print(f"{self.name}: right. {self._tried(cases)}; {error}.{note}")

    def cases(self):
        return list(self.inputs()) if self.inputs else [Case("")]

    def use(self, answer, case):
        """The Outcome of an answer on a case."""
        if self.kind == "value":
            return call(lambda value: value, answer, {})
        return call(self.run, answer, case.arguments)

    def fail(self, kind, *lines):
        end = f"Next: check.hint({self.name!r})."
        said = [line for line in lines if line is not None]  # "" is an empty line
        text = "\n".join([f"{self.name}: not right yet. Asked: {self.asks}.", "", *said, end])
        raise CheckFailed(text, kind) from None

    def _refuse_other_things(self, answer):
        if answer is ...:
            self.fail("not written", f"It is not written yet: put your answer in place of the `...` of {self.name}.")
        if self.kind == "value":
            if callable(answer):
                self.fail("type", "Expected the value itself, got a function. Call it, and hand in what it returns.")
        elif self.kind == "kernel" and not is_kernel(answer):
            self.fail("type", f"Expected a kernel, a function under @triton.jit, got {_compare.describe(answer)}.")
        elif self.kind == "function" and not callable(answer):
            came = _compare.describe(answer)
            self.fail("type", f"Expected the function itself, got {came}.", f"Write check.{self.name}(f), not f(...).")

    def _try(self, answer, cases):
        """The outcomes of the answer on all cases, and a second time on the first."""
        came = []
        try:
            with time_limit(self.seconds):
                for case in cases:
                    came.append(self.use(answer, case))
                again = self.use(answer, cases[0]) if self.kind != "value" else came[0]
        except TimeUp:
            self._too_slow(cases[min(len(came), len(cases) - 1)])
        for case, have in zip(cases, came, strict=True):
            names = [name for name in have.changed if name not in self.changes]
            if names:
                self.fail(
                    "changes its input",
                    f"Your function changes its argument {' and '.join(names)}. The caller still needs it.",
                    f"Work on a copy, {names[0]}.clone(), or write {names[0]} = {names[0]} * 2 in place of *=.",
                    *_compare.arguments(case.arguments),
                )
        if came[0].error is None and not self.same(came[0], again):
            self.fail(
                "remembers",
                "The same input, given twice, has two results: something is kept between calls.",
                *_compare.arguments(cases[0].arguments),
                f"  first    {_compare.show(as_tuple(came[0].value)[0])}",
                f"  at last  {_compare.show(as_tuple(again.value)[0]) if again.error is None else repr(again.error)}",
                "Look for a global variable, or a list or tensor as default argument.",
            )
        return came

    def _too_slow(self, case):
        said = f"It did not return within {self.seconds:g} seconds. Is there a loop that never ends?"
        self.fail("time", said, f"The input ({case.note}):", *_compare.arguments(case.arguments))

    def _complaint(self, want, have):
        if have.error is not None:
            return "writes outside" if isinstance(have.error, WroteOutside) else "raises", "", 0
        return _compare.complaint(want.value, have.value, self.results, self.tolerance)

    def same(self, want, have):
        """True if two outcomes are equal: equal values, or exceptions of one type."""
        if want.error is not None or have.error is not None:
            return type(want.error) is type(have.error)
        want, have = (torch_only(outcome.value) for outcome in (want, have))
        return _compare.complaint(want, have, self.results, self.tolerance) is None

    def recognise(self, cases, wanted, came, failed):
        """The known mistake that gives the same wherever the answer is wrong; at best, everywhere."""
        found = None
        for mistake in self.mistakes:
            theirs = {i: self.use(mistake.wrong, cases[i]) for i in failed}
            if all(self.same(theirs[i], came[i]) and self._complaint(wanted[i], theirs[i]) for i in failed):
                others = [i for i in range(len(cases)) if i not in failed]
                if all(self.same(self.use(mistake.wrong, cases[i]), came[i]) for i in others):
                    return mistake
                found = found or mistake
        return found

    def _explain(self, cases, wanted, came, complaints, failed):
        first = failed[0]
        kind, sentence, index = complaints[first]
        error = came[first].error
        if "NotImplementedError" in causes(error):
            self.fail("not written", NOT_WRITTEN)
        mistake = self.recognise(cases, wanted, came, failed)
        lines = []
        if mistake:
            kind = mistake.name
            lines += self._told(mistake)
        elif kind == "value":
            pairs = [
                (as_tuple(wanted[i].value)[index], as_tuple(came[i].value)[index])
                for i in failed
                if complaints[i][0] == "value" and complaints[i][2] == index
            ]
            kind, more = _compare.pattern(pairs, self.tolerance) or (kind, "")
            sentence = f"{sentence} {more}".strip()
        if error is not None:
            lines += raised(came[first])
        elif not mistake and self.kind != "value":
            lines += [sentence]
        lines += [self._where(cases, failed)]
        if self.kind == "value":  # the right value is not shown: it is what is asked for
            have, want = came[first].value, wanted[first].value
            plain = kind not in ("type", "count") and not isinstance(have, complex)
            side = plain and ("large" if have > want else "small")
            lines += [f"Yours is {_compare.show(have)}. That is too {side}." if plain else sentence]
        else:
            lines += [f"Smallest input that shows it ({cases[first].note}):"]
            lines += _compare.arguments(cases[first].arguments)
            lines += [] if error else _compare.results(wanted[first].value, came[first].value, index, self.results)
        self.fail(kind, *lines)

    def _where(self, cases, failed):
        if len(failed) == len(cases):
            return None
        facts = [_compare.facts(case.arguments, self.sizes) for case in cases]
        where = _compare.which_inputs([facts[i] for i in failed], [f for i, f in enumerate(facts) if i not in failed])
        return f"Wrong for {len(failed)} of {len(cases)} inputs{', ' + where if where else ''}."

    def _told(self, mistake):
        why = f"{mistake.says} {self.formula} See chapter {mistake.see or self.see}.".strip()
        return [f"This is what you get with {mistake.name}.", why, ""]

    def _verify(self, answer, cases):
        for case in cases:
            try:
                with time_limit(self.seconds):
                    problem = self.verify(_User(self, answer, case), **copied(case.arguments))
            except TimeUp:
                self._too_slow(case)
            if problem:
                known = isinstance(problem, Mistake)
                told = self._told(problem) if known else [problem]
                note = f"Smallest input that shows it ({case.note}):"
                self.fail(problem.name if known else None, *told, note, *_compare.arguments(case.arguments))
        print(f"{self.name}: right. {self._tried(cases)}.")

    def _tried(self, cases):
        if self.kind == "value":
            return "The value is compared with the exact one"
        dtypes = dict.fromkeys(_compare.facts(case.arguments, None).get("dtype", "") for case in cases)
        kinds = f" in {' and '.join(filter(None, dtypes))}" if any(dtypes) else ""
        return f"Tried on {len(cases)} inputs{kinds}, from {cases[0].note} to {cases[-1].note}"


class _User:
    """What `verify` gets: runs the answer on the case, and turns what goes wrong into CheckFailed."""

    def __init__(self, exercise, answer, case):
        self.exercise, self.answer, self.case, self.calls = exercise, answer, case, 0

    def __call__(self, **other):
        self.calls += 1  # a seed of its own for each call
        outcome = call(self.exercise.run, self.answer, self.case.arguments | other, seed=self.calls)
        if outcome.error is not None:
            if "NotImplementedError" in causes(outcome.error):
                self.exercise.fail("not written", NOT_WRITTEN)
            self.exercise.fail("raises", *raised(outcome), *_compare.arguments(self.case.arguments))
        names = [name for name in outcome.changed if name not in self.exercise.changes]
        if names:
            self.exercise.fail("changes its input", f"Your function changes its argument {' and '.join(names)}.")
        return outcome.value
