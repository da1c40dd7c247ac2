"""Day 14: clock - a simulated machine that others use too, on which a wrong way to measure shows its errors in seconds.

    from day14.clock import NoisyClock

    clock = NoisyClock(seed=1)
    seconds = [clock.step(0.050) for _ in range(100)]       # a step that takes 50 ms when nothing disturbs it

Drift, bursts, echoes, a heavy tail, jitter; and a beat on request. The real series in
`day14/results/aa_2cpu.json` takes a jitter of 0.11.
Source: day14/notes.md; Georges, Buytaert & Eeckhout 2007 (OOPSLA), on how benchmarks mislead.
"""

import math
import random


class NoisyClock:
    """Seconds of one step after the other, on a machine with a history: drift, bursts, echoes, a heavy tail."""

    def __init__(
        self,
        seed: int,
        drift: float = 0.10,
        burst: float = 0.4,
        echo: float = 0.04,
        tail: float = 0.06,
        beat: float = 0.0,
        jitter: float = 0.03,
    ):
        self.draw = random.Random(seed)
        self.drift, self.burst, self.echo, self.tail = drift, burst, echo, tail
        self.beat, self.jitter = beat, jitter
        self.now = 0
        self.period = self.draw.uniform(300, 900)  # steps between two hot, or busy, moments
        self.phase = self.draw.uniform(0, 2 * math.pi)
        self.level = self.draw.gauss(0, echo)
        self.slowed, self.burst_left = 0.0, 0

    def step(self, seconds: float) -> float:
        """How long a step of `seconds` takes now."""
        draw = self.draw
        self.now += 1
        wave = self.drift * math.sin(2 * math.pi * self.now / self.period + self.phase)  # heat, neighbours
        if self.burst_left:
            self.burst_left -= 1
        elif draw.random() < 1 / 80:  # another program wants the cores, for 5 to 40 steps
            self.burst_left, self.slowed = draw.randint(5, 40), draw.uniform(0.3, 1.0) * self.burst
        slowed = self.slowed if self.burst_left else 0.0
        # what one step leaves to the next
        self.level = 0.9 * self.level + draw.gauss(0, self.echo * math.sqrt(1 - 0.9**2))
        beat = self.beat if self.now % 2 else 0.0  # every second step: two loader workers of which one is slow, say
        spike = self.tail * draw.paretovariate(1.5) if draw.random() < 0.05 else 0.0  # a page fault, say
        jitter = draw.gauss(0, self.jitter)
        return seconds * math.exp(wave + slowed + self.level + jitter + beat) * (1 + min(spike, 10.0))
