"""Right and wrong answers to every exercise. They share no code with the bank of mistakes in minimamba.checks.

answers = Answers()

@answers.right("zoh")                 # at least three; mutants are made of the first
def block_matrix(A, B, delta): ...

@answers.wrong("zoh", "B̄ = ΔB")       # at least four, each with the name that the message must give it;
def mamba(A, B, delta): ...           # None where no name is expected, only that it is rejected

answers.wrong("twice", "e^z = 1/2")(-0.693)                        # a value
answers.equivalent("zoh", "the mutant as the table shows it", "the reason why it is no mistake")
"""

from collections import defaultdict


class Answers:
    def __init__(self):
        self.rights, self.wrongs, self.equivalents = defaultdict(list), defaultdict(list), defaultdict(dict)

    def right(self, *exercises):
        def add(answer):
            for exercise in exercises:
                self.rights[exercise].append(answer)
            return answer

        return add

    def wrong(self, exercise, mistake):
        def add(answer):
            self.wrongs[exercise].append((answer, mistake))
            return answer

        return add

    def equivalent(self, exercise, mutant, reason):
        self.equivalents[exercise][mutant] = reason
