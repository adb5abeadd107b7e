"""A guest in one boot sector, for tests of engines that boot disks: it is up in a tenth of a second under emulation.

It counts its boots on its own disk and says `guest: boot N` on the serial port, then powers off when the ACPI power button is
pressed (unless deaf). Registers: QEMU's PM1 event block at 0x600 and control block at 0x604 (ACPI 4.8.3).
"""

from __future__ import annotations

from pathlib import Path

_ORIGIN = 0x7C00
_SETUP = "fa31c08ed88ec08ed0bc007cfb"  # cli; ax=ds=es=ss=0; sp=0x7c00; sti
_READ = "b80102bb007eb90200b600cd13"  # int 13h: sector 2 of the boot disk to 0x7e00
_COUNT = "fe06007e"  # inc byte [0x7e00]
_WRITE = "b80103bb007eb90200b600cd13"
_DIGIT = "a0007e0430a2%s"  # al=[0x7e00]+'0'; the message's digit=al
_PRINT = "be%sac84c07406baf803eeebf5"  # si=message; until NUL: out 0x3f8
_ARM = "ba0206b80001ef"  # PM1_EN: power button
_LISTEN = "fbf4ba0006eda9000174f5"  # sti; hlt; until PM1_STS says power button
_POWER_OFF = "ba0406b80020ef"  # PM1_CNT: SLP_EN, S5
_HALT = "fbf4ebfc"
_TEXT = b"\r\nguest: boot 0\r\n\0"


def boot_sector(*, deaf: bool = False, powers_off: bool = False) -> bytes:
    """512 bytes. `deaf` never reacts to the power button, `powers_off` does not wait for it."""
    tail = _HALT if deaf else (_POWER_OFF if powers_off else _ARM + _LISTEN + _POWER_OFF) + _HALT
    length = len(bytes.fromhex(_SETUP + _READ + _COUNT + _WRITE + _DIGIT % "0000" + _PRINT % "0000" + tail))
    message = _ORIGIN + length
    digit = message + _TEXT.index(b"0")
    code = _SETUP + _READ + _COUNT + _WRITE + _DIGIT % _word(digit) + _PRINT % _word(message) + tail
    return (bytes.fromhex(code) + _TEXT).ljust(510, b"\0") + b"\x55\xaa"


def write_image(path: Path, *, deaf: bool = False, powers_off: bool = False) -> Path:
    """A raw image of 1 MiB."""
    path.write_bytes(boot_sector(deaf=deaf, powers_off=powers_off).ljust(1024 * 1024, b"\0"))
    return path


def boots_on(console: str) -> int:
    """The number of the latest boot, as the guest said it; 0 if it has not said any."""
    lines = [line for line in console.splitlines() if line.startswith("guest: boot ")]
    return int(lines[-1].removeprefix("guest: boot ")) if lines else 0


def _word(value: int) -> str:
    return value.to_bytes(2, "little").hex()
