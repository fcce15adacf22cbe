"""A zoo of optimizers as people write and copy them. None of them knows of this package."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import SGD, Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor
    from torch.nn import Parameter

    Closure = Callable[[], Any]


class CopyingSam(Optimizer):
    """Sharpness-aware minimization with a closure. It goes back to the weights by a copy."""

    def __init__(self, params: Any, lr: float, rho: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure: Closure) -> Any:
        closure = torch.enable_grad()(closure)
        loss = closure()
        held = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p, _ in held]).norm()
        for p, group in held:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=float(group["rho"] / (norm + 1e-12)))
        closure()
        for p, group in held:
            p.copy_(self.state[p]["old"]).add_(p.grad, alpha=-group["lr"])
        return loss


class SubtractingSam(CopyingSam):
    """Sharpness-aware minimization with a closure. It goes back to the weights by subtracting what it added."""

    @torch.no_grad()
    def step(self, closure: Closure) -> Any:
        closure = torch.enable_grad()(closure)
        loss = closure()
        held = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p, _ in held]).norm()
        moves = [p.grad * (group["rho"] / (norm + 1e-12)) for p, group in held]
        for (p, _), move in zip(held, moves, strict=True):
            p.add_(move)
        closure()
        for (p, group), move in zip(held, moves, strict=True):
            p.sub_(move).add_(p.grad, alpha=-group["lr"])
        return loss


class TwoStepSam(Optimizer):
    """Sharpness-aware minimization around a base optimizer, stepped by hand, as most repositories copy it."""

    def __init__(self, params: Any, base: type[Optimizer] = SGD, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad * (self.param_groups[0]["rho"] / (norm + 1e-12)))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        self.zero_grad()


class Polyak(Optimizer):
    """Polyak's step size: the closure's value over the squared norm of the gradient, where the least value is 0."""

    def __init__(self, params: Any, lr: float = 1.0, maximum: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "maximum": maximum})

    def step(self, closure: Closure) -> Any:
        with torch.enable_grad():
            loss = closure()
        held = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        squared = sum(float(p.grad.square().sum()) for p, _ in held)
        with torch.no_grad():
            for p, group in held:
                p.add_(p.grad, alpha=-group["lr"] * min(float(loss) / (squared + 1e-12), group["maximum"]))
        return loss


class TimmLookahead(Optimizer):
    """Lookahead as in timm: it shares the base optimizer's groups and never calls ``Optimizer.__init__``."""

    def __init__(self, base: Optimizer, alpha: float = 0.5, k: int = 2) -> None:
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._base_optimizer = base
        self.param_groups = base.param_groups
        self.defaults = base.defaults
        self.state = defaultdict(dict)
        for group in self.param_groups:
            group.update(alpha=alpha, k=k, steps=0)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        loss = self._base_optimizer.step(closure)
        for group in self.param_groups:
            group["steps"] += 1
            if group["steps"] % group["k"]:
                continue
            for p in group["params"]:
                slow = self._base_optimizer.state[p].setdefault("slow", p.clone())
                slow.add_(p - slow, alpha=group["alpha"])
                p.copy_(slow)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return self._base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._base_optimizer.load_state_dict(state_dict)
        self.param_groups = self._base_optimizer.param_groups


class ClassicLookahead(Optimizer):
    """Lookahead as in torch_optimizer: slow weights from the first step on, in a state of its own."""

    def __init__(self, optimizer: Optimizer, k: int = 2, alpha: float = 0.5) -> None:
        self.optimizer, self.k, self.alpha = optimizer, k, alpha
        self.param_groups = optimizer.param_groups
        self.defaults = optimizer.defaults
        self.state = defaultdict(dict)
        for group in self.param_groups:
            group["counter"] = 0

    def step(self, closure: Closure | None = None) -> Any:
        loss = self.optimizer.step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"] if group["counter"] == 0 else ():
                    slow = self.state[p].setdefault("slow", p.clone())
                    slow.add_(p - slow, alpha=self.alpha)
                    p.copy_(slow)
                group["counter"] = (group["counter"] + 1) % self.k
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)


class ScheduleFree(Optimizer):
    """Schedule-free SGD: it trains on y, an average of z and x; ``eval()`` switches the weights to x, ``train()`` back."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "k": 0, "train_mode": True})

    @torch.no_grad()
    def eval(self) -> None:
        self._switch(False, lambda p, z, beta: p.lerp_(z, 1 - 1 / beta))

    @torch.no_grad()
    def train(self) -> None:
        self._switch(True, lambda p, z, beta: p.lerp_(z, 1 - beta))

    def _switch(self, mode: bool, move: Callable[[Tensor, Tensor, float], Any]) -> None:
        for group in self.param_groups:
            if group["train_mode"] != mode:
                group["train_mode"] = mode
                for p in group["params"]:
                    if "z" in self.state[p]:
                        move(p, self.state[p]["z"], group["momentum"])

    def step(self, closure: Closure | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                group["k"] += 1
                for p in group["params"]:
                    if p.grad is not None:
                        z = self.state[p].setdefault("z", p.clone())
                        p.lerp_(z, 1 / group["k"])
                        p.add_(p.grad, alpha=group["lr"] * (group["momentum"] * (1 - 1 / group["k"]) - 1))
                        z.sub_(p.grad, alpha=group["lr"])
        return loss


class FusedIntoBackward(Optimizer):
    """Steps each parameter as soon as its gradient is there, and frees the gradient. Its own step only runs the closure."""

    def __init__(self, params: Iterable[Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})
        for p in self.param_groups[0]["params"]:
            p.register_post_accumulate_grad_hook(self._update)

    def _update(self, p: Tensor) -> None:
        assert p.grad is not None
        with torch.no_grad():
            p.add_(p.grad, alpha=-self.param_groups[0]["lr"])
        p.grad = None

    def step(self, closure: Closure | None = None) -> Any:
        return None if closure is None else closure()


class PlainWrapper:
    """No optimizer by class: it has the attributes that Lightning asks for, and passes everything on."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self.defaults, self.state = inner.defaults, inner.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def step(self, closure: Closure | None = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)


class Several(PlainWrapper):
    """Steps with several optimizers, one after the other."""

    def __init__(self, parts: list[Optimizer]) -> None:
        super().__init__(parts[0])
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Closure | None = None) -> Any:
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


class Prodigy(SGD):
    """Like Prodigy and D-Adaptation, it multiplies its learning rate by an estimate d, which each group keeps."""

    def __init__(self, params: Any, lr: float = 1.0, d: float = 1e-4, **options: Any) -> None:
        super().__init__(params, lr=lr, **options)
        for group in self.param_groups:
            group["d"] = d

    def step(self, closure: Closure | None = None) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] *= group["d"]
        loss = super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        return loss


class RelativeStep(Optimizer):
    """Like Adafactor with ``relative_step``: its groups have ``lr=None``."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": None, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-0.05)
        return loss
