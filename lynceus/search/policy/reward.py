"""The reward of a student: accuracy times a concave function of how much smaller it is; limits are soft at first.

N2N Learning, ICLR 2018, arXiv 1709.06030, section 3.3 and 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass

from lynceus.core.errors import AdviceError

HARDENS = 15  # iterations until a broken limit costs the whole reward


def compression_reward(compression: float) -> float:
    """R_c = C (2 - C) of C = 1 - parameters of the student / those of the teacher."""
    return compression * (2 - compression)


def softness(iteration: int) -> float:
    """eps = max(0, 1 - i/15)^4: what of the reward a broken limit leaves."""
    return max(0.0, 1 - iteration / HARDENS) ** 4


@dataclass(frozen=True, kw_only=True)
class Reward:
    """R = R_c R_a, or (eps - 1) + eps R_c R_a where a limit is broken; -1 for a structure of which no network comes.

    teacher_size: parameters. teacher_accuracy: in (0, 1], on the images that students are judged on.
    size_limit: parameters at most. accuracy_limit: share right at least.
    """

    teacher_size: int
    teacher_accuracy: float
    size_limit: int | None = None
    accuracy_limit: float | None = None

    def __post_init__(self) -> None:
        if self.teacher_size < 1 or not 0 < self.teacher_accuracy <= 1:
            raise AdviceError(
                f"The teacher has {self.teacher_size} parameters and answers {self.teacher_accuracy:.1%} right: it "
                "must be a trained network, or nothing can be learned from it."
            )

    def __call__(self, size: int, accuracy: float, iteration: int) -> float:
        """size: parameters of the student. accuracy: share right. iteration: from 0."""
        compression = 1 - size / self.teacher_size
        value = compression_reward(compression) * accuracy / self.teacher_accuracy
        if self.keeps(size, accuracy):
            return value
        eps = softness(iteration)
        return (eps - 1) + eps * value

    def keeps(self, size: int, accuracy: float) -> bool:
        """Whether both limits are kept."""
        small = self.size_limit is None or size <= self.size_limit
        return small and (self.accuracy_limit is None or accuracy >= self.accuracy_limit)
