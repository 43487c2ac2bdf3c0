"""The key mean of a layer: given by a file, or taken once, on the device, from the first real prefill."""

from collections.abc import Callable

import torch
from vllm.logger import init_logger

logger = init_logger(__name__)

# A mean of fewer keys may say little about the next: it is used, and the log says so.
FEW_TOKENS = 16


class GivenKeyMean:
    """A mean that a calibration file gives before anything is stored.

    Attributes:
        mean: float32 [num_kv_heads, head_dim], always at the same address.
    """

    def __init__(self, num_kv_heads: int, head_dim: int, device: torch.device) -> None:
        self.mean = torch.zeros(num_kv_heads, head_dim, dtype=torch.float32, device=device)
        self._given: torch.Tensor | None = None

    def give(self, mean: torch.Tensor) -> None:
        """Set the mean to one of the same shape."""
        self._given = mean
        self.restore()

    def restore(self) -> None:
        """Set it again: the device's memory may have been given up meanwhile."""
        if self._given is not None:
            self.mean.copy_(self._given)

    def observe(self, key: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Nothing changes it; that it was given is made sure of."""
        if self._given is None:
            raise RuntimeError("keys are stored before the calibration file gave this layer its mean")


class KeyMean:
    """A mean that is zero until keys with real slots come by, then theirs for the life of the process.

    Pages are shared between requests, so all keys of a layer are stored less the same mean.

    Attributes:
        mean: float32 [num_kv_heads, head_dim], always at the same address.
    """

    def __init__(
        self, num_kv_heads: int, head_dim: int, device: torch.device, start_up_is_over: Callable[[], bool]
    ) -> None:
        self.mean = torch.zeros(num_kv_heads, head_dim, dtype=torch.float32, device=device)
        self._num_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._start_up_is_over = start_up_is_over
        self._answer: tuple[torch.Tensor, torch.Tensor, torch.cuda.Event] | None = None
        self._taken: torch.Tensor | None = None

    def restore(self) -> None:
        """Set it again: the device's memory may have been given up meanwhile, and there may be pages that need it."""
        if self._answer is not None:
            self._answer[-1].synchronize()
            self._read_back()
        if self._taken is None:
            self.mean.zero_()
            self._num_tokens.zero_()
        else:
            self.mean.copy_(self._taken)

    def observe(self, key: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Take the mean of keys [num_tokens, num_kv_heads, head_dim] unless it was taken; negative slots do not count.

        Nothing waits for the device: whether it was taken is read back while other work goes on.
        """
        if self._taken is not None or not self._start_up_is_over():
            return
        # While a graph is captured there are no real keys, and asking an event would end the capture.
        if (key.is_cuda and torch.cuda.is_current_stream_capturing()) or self._read_back():
            return
        real = slot_mapping >= 0
        count = real.sum()
        total = torch.where(real[:, None, None], key, 0).sum(dim=0, dtype=torch.float32)
        mean = total / count.clamp(min=1)
        taken = (self._num_tokens == 0) & (count > 0) & mean.isfinite().all()
        self.mean.copy_(torch.where(taken, mean, self.mean))
        self._num_tokens.copy_(torch.where(taken, count, self._num_tokens))
        self._ask()

    def _ask(self) -> None:
        if not self.mean.is_cuda:
            self._settle(int(self._num_tokens), self.mean)
            return
        count, mean = (torch.empty_like(x, device="cpu", pin_memory=True) for x in (self._num_tokens, self.mean))
        count.copy_(self._num_tokens, non_blocking=True)
        mean.copy_(self.mean, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        self._answer = count, mean, done

    def _read_back(self) -> bool:
        if self._answer is not None and self._answer[-1].query():  # type: ignore[no-untyped-call]
            self._settle(int(self._answer[0]), self._answer[1])
            self._answer = None
        return self._taken is not None

    def _settle(self, num_tokens: int, mean: torch.Tensor) -> None:
        if num_tokens:
            self._taken = mean.clone()
        if 0 < num_tokens < FEW_TOKENS:
            logger.warning_once(
                "TurboQuant took its key means from a first prompt of %d tokens. Send a longer one first, of %d or "
                "more, for means that fit other prompts better.",
                num_tokens,
                FEW_TOKENS,
            )
