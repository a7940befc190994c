"""Where and how tensors are computed: device, precision, memory layout, allocator, random draws."""

import copy
import ctypes
import hashlib
import math
import os
from contextlib import nullcontext

import torch

from lib import DataError

BYTES_PER_PIXEL = 2**14  # of a GPU that are set aside for a pixel: 128 maps of 32 channels


def best_device(name="auto"):
    """The torch device called ``name``; ``auto`` is the GPU where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise DataError(f"device '{name}' is asked for, but torch sees no GPU: set device: auto")
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # several processes train together, see parallel
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(name)
    try:
        return torch.device(name)
    except RuntimeError:
        raise DataError(f"device '{name}' is not one of auto, cpu, cuda") from None


def has_bfloat16(device):
    """True where the hardware multiplies bfloat16 itself; elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Numerics:
    """The device together with the precision and memory layout that are fast on it.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto`` (bfloat16 where the hardware has it), ``bfloat16`` or ``float32``.
        deterministic: on a GPU, convolutions whose sums come in the same order in every run.

    Only networks run under autocast. Losses, sampling grids and displacement fields stay in float32.
    """

    formats = {4: torch.channels_last, 5: torch.channels_last_3d}  # memory layout, by the number of dimensions

    def __init__(self, device="auto", precision="auto", deterministic=False):
        self.device = best_device(device)
        if precision == "auto":
            precision = "bfloat16" if has_bfloat16(self.device) else "float32"
        if precision not in ("bfloat16", "float32"):
            raise ValueError(f"precision '{precision}' is not one of auto, bfloat16, float32")
        self.precision = precision
        self.share = 1.0  # of the memory that is usually there
        if self.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = precision == "bfloat16"  # else inputs are rounded to ten bits
            torch.backends.cudnn.deterministic = deterministic
            torch.backends.cudnn.benchmark = not deterministic  # the fastest convolution, found by trying
        keep_heap()

    @property
    def name(self):
        """The device in words, for tables: the GPU's name, or the CPU's threads."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU ({torch.get_num_threads()} threads)"

    def place(self, network):
        """The network, moved to the device in this layout."""
        dimensions = max(value.ndim for value in network.parameters())
        return network.to(self.device, memory_format=self.formats.get(dimensions))

    def tensor(self, array):
        """An image-shaped array as a float32 tensor on the device, in this layout."""
        tensor = torch.as_tensor(array, dtype=torch.float32).to(self.device)
        return tensor.contiguous(memory_format=self.formats.get(tensor.ndim, torch.contiguous_format))

    def autocast(self):
        """Context in which networks run."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def batch(self, images):
        """How many images a network sees at once without gradients: what fits the cache, or the GPU's memory.

        Args:
            images: ``(n, channels, *space)``.
        """
        pixels = 2**18
        if self.device.type == "cuda":
            pixels = torch.cuda.get_device_properties(self.device).total_memory // BYTES_PER_PIXEL
        return max(1, int(self.share * pixels) // math.prod(images.shape[2:]))

    def sharing(self, share):
        """The same numerics, with batches for a share of the memory."""
        other = copy.copy(self)
        other.share = share
        return other

    def generator(self, *names):
        """A generator on the device, seeded by ``names`` (numbers and words), for all draws of one piece of work."""
        return torch.Generator(self.device).manual_seed(seed_of(*names))


def out_of_memory(error):
    """Whether an exception says that memory does not suffice; torch's has no class of its own on the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def seed_of(*names):
    """A 63-bit seed that depends on every one of ``names`` and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def keep_heap():
    """Tell glibc to keep freed memory instead of returning it to the system.

    Feature maps at full resolution are tens of megabytes; by default each one is mapped, zeroed page by page
    and unmapped again in every operation, which costs more than the convolutions. Does nothing elsewhere.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        pass
