"""Deep ensembles: M networks, or M LightningModules, trained side by side."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_uq import batches
from lightning_uq.checkpoint_files import read_weights
from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.functional.adversarial import adversarial_loss
from lightning_uq.functional.bootstrap import Bootstrap, bootstrap_weights
from lightning_uq.modules.averages import averaged_copies
from lightning_uq.modules.base import Targets, UncertaintyModule, expect_eval_mode, restore_argument, training_option
from lightning_uq.modules.building import (
    SAME_START,
    build_members,
    check_arguments,
    check_lightning_arguments,
    run_members,
)
from lightning_uq.modules.checkpoints import (
    convert_optimizer_state,
    convert_scheduler_state,
    factory_of,
    load_member,
)
from lightning_uq.modules.input_range import training_range
from lightning_uq.modules.members import MemberHooks, call_step, misfit_of
from lightning_uq.networks.ensemble import EnsembleNetwork, Execution
from lightning_uq.networks.factory import Factory
from lightning_uq.networks.held_buffers import held_buffers
from lightning_uq.networks.output import Output
from lightning_uq.networks.priors import NetworkWithPrior
from lightning_uq.registry import Setting, register_method
from lightning_uq.tasks import OutputShapeError

_STATE = "lightning_uq_ensemble"


class EnsembleModule(MemberHooks, UncertaintyModule):
    """A deep ensemble: M members from one factory, each trained as it would be alone, and read as one prediction.

    The factory builds plain networks, trained here, or your own LightningModules, unmodified: then every member's
    ``training_step``, ``validation_step``, ``configure_optimizers``, hooks and logging run as they are. What a member logs
    as ``val_loss`` appears as ``member_3/val_loss``, and the members' mean as ``val_loss``; this module's own metrics of
    the ensemble then stand under ``ensemble/val_*`` and ``ensemble/test_*``.

    Member i is what the factory builds in a process that ``member_seed(seed, i)`` seeds; a LightningModule then goes on with
    the random numbers of such a process, and, given the same batches, ends with exactly the weights that it would have alone.
    A resumed training goes on with the random state, and so the data order, of the one that it resumes.

    The loss is the sum over members, so each gets exactly the gradient that it would get alone; gradient clipping is per
    member. ``train_loss`` is logged as the mean.

    Args:
        network: A factory, called once a member: a :class:`Factory`, a class, a function or a lambda.
        num_members: M.
        adversarial_epsilon: Size of an FGSM step whose loss is averaged with the clean one: 0.5 l(x) + 0.5 l(x'). The paper
            adds the two, which doubles the gradient; its step is 0.01 of the range.
        prior_network: Factory of an additive random prior, frozen, one a member; the network's own factory matches it.
        prior_scale: Scale of the prior.
        bootstrap: Weights of the samples in each member's loss: ``"bernoulli"`` (0 or 2), ``"exponential"``, ``"poisson"`` or
            ``"uniform"``. They belong to a sample's position, so batches must carry it: see :class:`data.Indexed`.
        adversarial_scale: ``"range"``: the step is in units of each input dimension's range (each channel's, for images)
            over the training data; ``"absolute"``: in units of the input.
        output: What a member's forward returns: ``"logits"``, ``"probs"``, ``"log_probs"`` or a function that picks them.
        seed: Seeds the members' initial weights, random streams and bootstrap; drawn from the global generator by default.
        execution: ``"loop"``, ``"stacked"`` (linear layers of all members in one product), ``"vmap"``, or ``"auto"``.
        training: Arguments of :class:`UncertaintyModule`. The ``optimizer`` is called with one group of parameters per member, or one
            of stacked leaves; LightningModules bring their own, and their own loss. ``bootstrap`` is a name for a
            ``data_noise`` that this module seeds.

    Raises:
        InputError: The arguments do not go together, or the factory does not build M networks.
        UnsupportedError: The members, or the optimizer, cannot run under the ``execution`` asked for.

    Source: Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles", NeurIPS
    2017 (arXiv 1612.01474).

    Example:
        >>> ensemble = EnsembleModule(lambda: nn.Linear(4, 3), num_members=5, seed=0)
        >>> prediction = ensemble.predict(torch.zeros(2, 4))
        >>> prediction.logits.shape, prediction.probs.shape
        (torch.Size([5, 2, 3]), torch.Size([2, 3]))
    """

    preferred_ood_scores = ("mutual_information", "epistemic_variance")
    network: EnsembleNetwork

    def __init__(
        self,
        network: Factory | Callable[[], nn.Module],
        *,
        num_members: int = 5,
        adversarial_epsilon: float | None = None,
        prior_network: Factory | Callable[[], nn.Module] | None = None,
        prior_scale: float = 0.0,
        bootstrap: Bootstrap | None = None,
        adversarial_scale: Literal["range", "absolute"] = "range",
        output: Output = "logits",
        seed: int | None = None,
        execution: Execution = "auto",
        **training: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__", "training")}
        given["seed"] = seed = int(torch.randint(2**31 - 1, ())) if seed is None else seed
        given.update({name: restore_argument(given[name], name) for name in ("network", "prior_network")})
        optimizer = training_option(training, "optimizer", torch.optim.Adam)
        check_arguments(**given)
        members, streams = build_members(
            given["network"], num_members, seed, prior_network=given["prior_network"], prior_scale=prior_scale
        )
        lightning_members = [member for member in members if isinstance(member, LightningModule)]
        if lightning_members:
            check_lightning_arguments(type(members[0]).__name__, **{**given, **training, "optimizer": optimizer})
        super().__init__(run_members(members, execution, restore_argument(output, "output"), optimizer), **training)
        self.seed = seed
        self.bootstrap = bootstrap or "none"
        self.adversarial_epsilon = adversarial_epsilon
        self.adversarial_scale = adversarial_scale
        self.input_range: Tensor | None
        self.register_buffer("input_range", None)
        self._range_is_restored = False
        self._says_why = execution == "auto" and not lightning_members
        self._warned_of_misfit = False
        if lightning_members:
            self.adopt(lightning_members, streams)
        self._save_arguments(**given)

    @classmethod
    def from_checkpoints(
        cls,
        checkpoints: Sequence[str | Path],
        network: Factory | Callable[[], nn.Module] | None = None,
        *,
        module_class: type[LightningModule] | None = None,
        **kwargs: Any,
    ) -> "EnsembleModule":
        """Collect members that were trained apart.

        Args:
            checkpoints: One file a member: a Lightning checkpoint, or a state dict alone, read with ``weights_only=True``.
            network: Factory of a member, a plain network or a LightningModule; the weights of a plain network are also
                found below an attribute of a LightningModule's.
            module_class: Instead of ``network``: the LightningModule that wrote the files, called with their
                hyper-parameters. Neither is needed for files of a :class:`DeterministicModule` with an importable factory.
            kwargs: Further arguments of :class:`EnsembleModule`.

        Raises:
            InputError: A file cannot be read, or does not fit what the factory builds.

        Example:
            >>> import tempfile
            >>> networks = [nn.Linear(4, 3) for _ in range(2)]
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     paths = [f"{folder}/{i}.pt" for i in range(2)]
            ...     for path, trained in zip(paths, networks):
            ...         torch.save(trained.state_dict(), path)
            ...     ensemble = EnsembleModule.from_checkpoints(paths, lambda: nn.Linear(4, 3))
            >>> torch.equal(ensemble.network.member(1).weight, networks[1].weight)
            True
        """
        if isinstance(checkpoints, str | Path) or not checkpoints:
            raise InputError(f"Expected argument `checkpoints` to be a list of files, but got {checkpoints!r}.")
        if network is not None and module_class is not None:
            raise InputError("Expected one of the arguments `network` and `module_class`, but got both.")
        if "num_members" in kwargs:
            raise InputError("Expected no argument `num_members`: there is one member a file.")
        files = [read_weights(path, "argument `checkpoints` to name checkpoints") for path in checkpoints]
        if network is None:
            network, found = factory_of(module_class, [hyper_parameters for _, hyper_parameters in files], checkpoints)
            kwargs = {**found, **kwargs}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f".*{SAME_START}")  # they are about to be replaced
            ensemble = cls(network, num_members=len(files), **kwargs)
        state: dict[str, Tensor] = {}
        for i, (path, (weights, _)) in enumerate(zip(checkpoints, files, strict=True)):
            member = ensemble.network.member(i)
            load_member(member, weights, path)
            state.update({f"members.{i}.{name}": value for name, value in member.state_dict().items()})
        ensemble.network.load_state_dict(state)
        return ensemble

    # ------------------------------------------------------------------ training

    def setup(self, stage: str) -> None:
        """Say how the members run, and agree on the seed over ranks."""
        if self._says_why and stage == "fit":
            rank_zero_info(self.network.execution_reason)
            self._says_why = False
        if stage == "fit":
            self._check_averaging()
            priors = [part.prior for part in self.network.modules() if isinstance(part, NetworkWithPrior)]
            expect_eval_mode(sum(len(list(prior.modules())) for prior in priors))
        self.seed = self.trainer.strategy.broadcast(self.seed)
        super().setup(stage)

    def _check_averaging(self) -> None:
        kind = StochasticWeightAveraging
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
        if not self.network.is_stacked or not any(isinstance(callback, kind) for callback in callbacks):
            return
        if kind.pl_module_contains_batch_norm(self.network.member(0)):  # type: ignore[arg-type]  # any module does
            raise UnsupportedError(
                "StochasticWeightAveraging measures the statistics of BatchNorm layers anew for its average, and does not "
                "find those of members that run at once: they would stay those of the last weights. Use execution='loop'."
            )

    def on_train_start(self) -> None:
        """Take the range of the inputs, where adversarial steps are measured in it."""
        super().on_train_start()
        if self.adversarial_epsilon is not None and self.adversarial_scale == "range" and not self._range_is_restored:
            self.input_range = training_range(self, self.unpack_batch)
            for average in averaged_copies(self.trainer):  # they were made before there was a range
                average.input_range = self.input_range.clone()
        self._range_is_restored = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        """One step of every member; plain networks log ``train_loss``, LightningModules what they log."""
        if self.lightning_members:
            return self.training_steps(batch, batch_idx)
        x, y = self._labelled(batch, batch_idx)
        loss = self.training_loss(x, y, batch)
        self._check_first_loss(loss)
        self._log_training(loss.detach() / self.network.num_indices, x)
        return loss

    def training_loss(self, x: Any, y: Tensor, batch: Any) -> Tensor:
        """Sum over members of their losses."""
        targets = self.targets(y, batch, torch.arange(self.network.num_indices))
        if self.adversarial_epsilon is None:
            return self.regularized(self.index_losses(self.network(x), targets).sum(), x)
        step = self._adversarial_step(x)
        loss = adversarial_loss(
            lambda xs: self.index_losses(self.network.forward_each(xs), targets).sum(),
            x.expand(self.network.num_indices, *x.shape),
            list(self.network.parameters()),
            step,
            loss_scale=self._loss_scale(),
            second_pass=held_buffers(self.network),
        )
        return self.regularized(loss, x)

    def member_training_step(self, member: LightningModule, batch: Any, batch_idx: int) -> Any:
        """A LightningModule's own training step, averaged with that of the adversarial batch where one is asked for."""
        if self.adversarial_epsilon is None:
            return super().member_training_step(member, batch, batch_idx)
        x, _ = self.unpack_batch(batch)
        step = self._adversarial_step(x)
        outputs: list[Any] = []

        def loss(inputs: Tensor) -> Tensor:
            outputs.append(call_step(member.training_step, _with_input(batch, inputs), batch_idx))
            value = outputs[-1]["loss"] if isinstance(outputs[-1], Mapping) else outputs[-1]
            if not isinstance(value, Tensor):
                raise InputError(f"Expected `training_step` to return a loss for every batch, but got {value!r}.")
            return value

        value = adversarial_loss(
            loss, x, list(member.parameters()), step, loss_scale=self._loss_scale(), second_pass=self.quiet(member)
        )
        return {**outputs[0], "loss": value} if isinstance(outputs[0], Mapping) else value

    def targets(self, y: Tensor, batch: Any, index: Tensor) -> Targets:
        """Targets and weights as ``data_noise`` and ``bootstrap`` make them; their weights are multiplied."""
        found = super().targets(y, batch, index)
        if self.bootstrap == "none":
            return found
        sample = batches.known_sample_index(batch, f"bootstrap={self.bootstrap!r}").to(self.device)
        bootstrap = bootstrap_weights(sample, index, self.seed, self.bootstrap)
        noise = found.noise_weights
        return found._replace(noise_weights=bootstrap if noise is None else bootstrap * noise)

    def _adversarial_step(self, x: Any) -> float | Tensor:
        assert self.adversarial_epsilon is not None
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise InputError(
                f"Expected the input to be a floating-point tensor for adversarial training, but got {got}."
            )
        if self.adversarial_scale == "absolute":
            return self.adversarial_epsilon
        if self.input_range is None:
            raise InputError(
                "The range of the training inputs is not known: train with a Trainer, which takes it, or pass "
                '`adversarial_scale="absolute"`.'
            )
        return (self.adversarial_epsilon * self.input_range).to(x.dtype)

    def _scaler(self) -> Any:
        return getattr(getattr(self._trainer, "precision_plugin", None), "scaler", None)

    def _loss_scale(self) -> Any:
        scaler = self._scaler()
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.device))

    # ------------------------------------------------------------------ evaluation

    def _logs_before_batches(self) -> bool:
        return not self.lightning_members  # theirs are logged once they fit the task

    def _evaluate(
        self, stage: str, metric_sets: nn.ModuleList, loaders: list[Any], batch: Any, batch_idx: int, loader_idx: int
    ) -> None:
        if self.lightning_members:
            step = "validation_step" if stage == "val" else "test_step"
            self.evaluation_steps(step, batch, batch_idx, loader_idx)
            misfit = misfit_of(self.lightning_members[0], batch, self.unpack_batch, self.task)
            if misfit is None and not self._warned_of_misfit:
                try:
                    super()._evaluate(f"ensemble/{stage}", metric_sets, loaders, batch, batch_idx, loader_idx)
                except OutputShapeError as error:
                    # A user's module need not predict two classes, or a variance, for its own steps to be right.
                    misfit = str(error)
            if misfit is not None:
                self._warn_of_misfit(misfit)
                for metric in metric_sets[loader_idx].values():  # type: ignore[operator]  # a ModuleList yields bare Modules
                    metric.reset()  # a part of the data would pass for all of it
            return
        super()._evaluate(stage, metric_sets, loaders, batch, batch_idx, loader_idx)

    def _check_output(self, output: Tensor) -> None:
        with self._as_misfit():
            super()._check_output(output)

    def _check_target(self, y: Tensor, output: Tensor) -> None:
        with self._as_misfit():
            super()._check_target(y, output)

    @contextmanager
    def _as_misfit(self) -> Iterator[None]:
        """Let the metrics of the whole be left out where LightningModules that train alone do not fit the task."""
        try:
            yield
        except InputError as error:
            if self.lightning_members:
                raise OutputShapeError(str(error)) from error
            raise

    def _warn_of_misfit(self, reason: str) -> None:
        if not self._warned_of_misfit:
            rank_zero_info(f"The ensemble as a whole has no metrics: {reason.rstrip('.')}.")
        self._warned_of_misfit = True

    # ------------------------------------------------------------------ optimizer and checkpoint

    def optimized_parameters(self) -> list[Any]:
        """One parameter group a member, or one of the stacked leaves."""
        groups = [[p for p in group if p.requires_grad] for group in self.network.parameter_groups()]
        return [{"params": group} for group in groups if group]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all members; the members' own, as one, where they are LightningModules."""
        return self.configure_members() if self.lightning_members else super().configure_optimizers()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each member's gradient by itself."""
        if self.lightning_members:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            if self._scaler() is not None and _optimizer_handles_unscaling(optimizer):
                raise UnsupportedError(
                    f"{type(optimizer).__name__} unscales gradients within its own step, after they would be clipped: leave out "
                    "`fused=True`, or `gradient_clip_val`."
                )
            self.network.clip_gradients_per_member(gradient_clip_val, gradient_clip_algorithm or "norm")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what going on exactly needs: the seed, how the members run, and what they add themselves."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_STATE] = {
            "seed": self.seed,
            "stacked": self.network.is_stacked,
            **self.save_members(checkpoint),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again; an optimizer state of another execution is converted."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get(_STATE)
        if saved is None:
            return
        size = len({name.split(".")[2] for name in checkpoint["state_dict"] if name.startswith("network.members.")})
        if size != self.network.num_indices:
            raise InputError(
                f"Expected a checkpoint of {self.network.num_indices} members (argument `num_members`), but it holds {size}."
            )
        self.seed = saved["seed"]
        self.load_members(checkpoint, saved, resuming=self.is_resuming)
        if not self.is_resuming:
            return
        self._range_is_restored = "input_range" in checkpoint["state_dict"]
        stack = self.network.is_stacked
        if stack != saved["stacked"] and "optimizer_states" in checkpoint:
            states, schedulers = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
            checkpoint["optimizer_states"] = [convert_optimizer_state(s, size, stack=stack) for s in states]
            checkpoint["lr_schedulers"] = [convert_scheduler_state(s, size, stack=stack) for s in schedulers]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}input_range" in state_dict:
            self.input_range = torch.empty_like(state_dict[f"{prefix}input_range"], device=self.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _with_input(batch: Any, x: Tensor) -> Any:
    """The batch with another input."""
    if isinstance(batch, Mapping):
        return {**batch, "input": x}
    if isinstance(batch, list | tuple):
        return type(batch)(*(x, *batch[1:])) if hasattr(batch, "_fields") else type(batch)((x, *batch[1:]))
    return x


@register_method("ensemble", ood_score="mutual_information")
def _ensemble(setting: Setting) -> EnsembleModule:
    members = setting.options.get("num_members", 5)
    return EnsembleModule(setting.network, num_members=members, optimizer=setting.optimizer)
