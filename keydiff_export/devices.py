"""Devices that `plan` predicts for: peaks from data sheets, and the share of them that published runs reach.

    device          memory     int8      float32   reached: memory, int8, float32
                    GB/s       Top/s     TFLOP/s
    8 Gen 3         76.8       2.84      0.355     0.53, 0.18, 0.33
    8 Elite         84.8       4.12      0.515     0.53, 0.18, 0.33
    cpu             20.1       1.38      0.346     0.91, 0.70, 0.63

A device is its CPU, because that is what the targets executorch-xnnpack and onnx-cpu use. Sources:

- 8 Gen 3: LPDDR5X at 4,800 MHz, 64 bits (Qualcomm's product brief). One Cortex-X4 at 3.3 GHz with four 128-bit
  pipes, five Cortex-A720 at 3.2 and 3.0 GHz with two each; a pipe does 64 int8 or 8 float32 operations a cycle (SMMLA
  and FMLA in Arm's software optimisation guides). Reached: ExecuTorch with XNNPACK on a OnePlus 12, Llama-3.2-1B, 64
  prompt tokens (pytorch/executorch, examples/models/llama/README.md): SpinQuant 50.2 tokens/s at 0.81 GB a token and
  260.5 tokens/s of prefill at 1.95 GFLOP a token; BF16 60.3 tokens/s of prefill, which stands in for float32.
- 8 Elite: LPDDR5X at 5,300 MHz, 64 bits; a CPU "45 % faster" than the 8 Gen 3's (Qualcomm's announcement), so its
  peaks times 1.45. Reached: assumed to be the 8 Gen 3's; there is no published run of the same kind.
- cpu: two x86 cores with AVX-512 VNNI at about 2.7 GHz, memory copy as measured. Reached: this project's int8 demo
  (README, "Measured"; 111 tokens/s at 164 MB a token, 2,313 tokens/s of prefill). Scale it to your machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UserError


@dataclass(frozen=True)
class Device:
    """Peaks of a device and the shares that are reached.

    Attributes:
        memory: bytes/s.
        int8, float32: operations/s, a multiplication and an addition being two.
        memory_reached, int8_reached, float32_reached: shares in (0, 1].
    """

    memory: float
    int8: float
    float32: float
    memory_reached: float
    int8_reached: float
    float32_reached: float

    @property
    def bytes_per_s(self) -> float:
        """Bytes/s that a decode step moves."""
        return self.memory * self.memory_reached

    def flops_per_s(self, integer: bool) -> float:
        """Operations/s of matrix products, with int8 or with float32 activations."""
        return self.int8 * self.int8_reached if integer else self.float32 * self.float32_reached


DEVICES = {
    "8 Gen 3": Device(76.8e9, 2.84e12, 0.355e12, 0.53, 0.18, 0.33),
    "8 Elite": Device(84.8e9, 4.12e12, 0.515e12, 0.53, 0.18, 0.33),
    "cpu": Device(20.1e9, 1.38e12, 0.346e12, 0.91, 0.70, 0.63),
}


def get_device(name: str) -> Device:
    """The device of that name, in any spelling of its capitals.

    Raises:
        UserError: unknown name; the message lists those known.
    """
    for known, device in DEVICES.items():
        if known.lower() == name.strip().lower():
            return device
    raise UserError(f"unknown device {name!r}: choose one of {', '.join(DEVICES)}")
