"""Deep ensembles: M networks, or M LightningModules, trained side by side."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_uq import batches
from lightning_uq._lightning import optimizer_handles_unscaling, trainer_of
from lightning_uq.errors import InputError, UnsupportedError
from lightning_uq.functional.bootstrap import Bootstrap, bootstrap_weights
from lightning_uq.lightning_trees import is_instance
from lightning_uq.modules.adversarial import Adversary
from lightning_uq.modules.arguments import training_option
from lightning_uq.modules.base import UncertaintyModule
from lightning_uq.modules.building import (
    build_members,
    check_arguments,
    check_averaging,
    ignore_same_start,
    on_trunk,
    run_members,
    share_weights,
)
from lightning_uq.modules.frozen import in_eval_mode
from lightning_uq.modules.lightning_ensemble.checks import check_lightning_arguments
from lightning_uq.modules.lightning_ensemble.hooks import with_members
from lightning_uq.modules.lightning_ensemble.members import Members
from lightning_uq.modules.member_files import (
    ENSEMBLE_STATE,
    check_size,
    convert_states,
    load_member_files,
    read_member_files,
)
from lightning_uq.modules.member_losses import sum_of_losses
from lightning_uq.modules.member_share import MemberShare
from lightning_uq.modules.targets import Targets
from lightning_uq.networks.ensemble import EnsembleNetwork, Execution
from lightning_uq.networks.factory import Factory
from lightning_uq.networks.output import Output
from lightning_uq.predictions import Prediction
from lightning_uq.running.inferred_task import InferredTask
from lightning_uq.tasks import describe


@with_members
class EnsembleModule(UncertaintyModule):
    """A deep ensemble: M members from one factory. Each is trained as it would be alone, and together they make one prediction.

    The factory builds plain networks, which this module trains, or your own unmodified LightningModules. LightningModules run with
    their own ``training_step``, ``validation_step``, ``configure_optimizers``, hooks and logging. A value ``val_loss`` that a
    member logs appears as ``member_3/val_loss``, and the mean over members as ``val_loss``. Metrics of the ensemble as a whole are
    then named ``ensemble/val_*`` and ``ensemble/test_*``.

    Member i equals the module that the factory builds in a process seeded with ``member_seed(seed, i)``. A LightningModule then
    continues with the random numbers of such a process: given the same batches, it ends with exactly the weights of a separate
    training. It gets its own copy of each batch, and a ``trainer`` with its own ``model`` and optimizers. A resumed training
    continues with the stored random state, and so with the stored data order. A loader without a ``generator`` draws from the same
    stream as dropout, so a module that trains alone shares that stream with its loaders. For bitwise equality, give the training
    and validation loaders their own ``generator``.

    In training, validation and test, each member applies its own ``on_after_batch_transfer`` to the batch. The ensemble's metrics,
    its predictions and the callbacks use the input that the first member's hook returns.

    Members share one Trainer and its epochs. The first member that sets ``trainer.should_stop`` stops all, with a warning.
    Members that return -1 from ``on_train_batch_start`` must do so at the same batch. A member's ``on_*_model_eval`` sets the modes
    for its own steps; metrics of the ensemble and its predictions run in eval mode.

    If no ``task`` is given and the first batches with targets hold numbers of the outputs' shape, LightningModules are treated as
    regressors that predict means, and this is reported. Weights alone do not show the task: to load them, pass
    ``task=Regression(head="mean")``.

    With LightningModules as members, every hook listed in ``lightning_ensemble/hooks.py`` also goes to ``members``. They replace
    this class's ``training_step`` and optimization hooks, and receive the other hooks in addition. An override of a replaced hook
    in this class applies to plain networks only.

    The loss is the sum over members, so each member gets exactly the gradient of its own loss. Gradients are clipped per member.
    ``train_loss`` is the mean over members.

    Args:
        network: A factory, called once per member: a :class:`Factory`, a class, a function or a lambda.
        num_members: M.
        adversarial_epsilon: Size of an FGSM step. The loss becomes the mean of clean and adversarial loss, 0.5 l(x) + 0.5 l(x').
            The paper adds the two, which doubles the gradient; its step is 0.01 of the range.
        prior_network: Factory of an additive, frozen random prior, one per member. You can pass the same factory as ``network``.
        prior_scale: Scale of the prior.
        bootstrap: Distribution of the samples' weights in each member's loss: ``"bernoulli"`` (0 or 2), ``"exponential"``,
            ``"poisson"`` or ``"uniform"``. A weight belongs to a sample's position, so batches must carry it: see :class:`data.Indexed`.
        adversarial_scale: Unit of the step. ``"range"``: each input dimension's range over the training data (each channel's, for
            images). ``"absolute"``: the unit of the input.
        output: What a member's ``forward`` returns: ``"logits"``, ``"probs"``, ``"log_probs"`` or a function that picks the logits.
        seed: Seeds the members' initial weights, random streams and bootstrap; drawn from the global generator by default.
        execution: ``"loop"``, ``"stacked"`` (linear layers of all members in one product), ``"vmap"``, or ``"auto"``.
        trunk: A network, or a factory of it, that all members share: it runs once, and ``network`` builds heads on its output. It is trained by
            the mean of their losses. If none of its parameters requires a gradient, it is frozen and in eval mode.
        sharing: ``"batch_ensemble"`` (:class:`networks.BatchEnsembleNetwork`), or a ``peft.LoraConfig`` (:class:`networks.LoraEnsembleNetwork`).
        training: Arguments of :class:`UncertaintyModule`. The ``optimizer`` is called with one parameter group per member, or with
            one group of stacked parameters. LightningModules bring their own optimizer and loss. ``bootstrap`` is a shortcut for a
            ``data_noise`` that this module seeds.

    Attributes:
        members: The LightningModules as one object; None for plain networks.
        inferred_task: The task inferred from the batches of LightningModules without a ``task``; predictions raise while it is in
            doubt. None if the task was given.
        adversary: Takes the adversarial steps; None without ``adversarial_epsilon``.

    Raises:
        InputError: Arguments contradict each other, or the factory does not build M networks.
        UnsupportedError: The members or the optimizer cannot run under the requested ``execution``.

    Source: Lakshminarayanan et al., NeurIPS 2017 (arXiv 1612.01474).

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
        trunk: nn.Module | Factory | Callable[[], nn.Module] | None = None,
        sharing: Any = None,
        **training: Any,
    ) -> None:
        seed = int(torch.randint(2**31 - 1, ())) if seed is None else seed
        self._replace_given(seed=seed)
        optimizer = training_option(training, "optimizer", torch.optim.Adam)
        check_arguments(
            network=network,
            num_members=num_members,
            seed=seed,
            adversarial_epsilon=adversarial_epsilon,
            adversarial_scale=adversarial_scale,
            prior_network=prior_network,
            prior_scale=prior_scale,
            bootstrap=bootstrap,
            trunk=trunk,
            sharing=sharing,
        )
        has_predict_fn = training_option(training, "predict_fn", None) is not None
        members, streams = build_members(
            network,
            num_members if sharing is None else 1,
            seed,
            prior_network=prior_network,
            prior_scale=prior_scale,
            has_predict_fn=has_predict_fn,
        )
        lightning_members = [member for member in members if is_instance(member, LightningModule)]
        own = {"optimizer": optimizer, "prior_network": prior_network, "bootstrap": bootstrap, "trunk": trunk}
        if lightning_members:
            check_lightning_arguments(type(members[0]).__name__, **{**training, **own, "sharing": sharing})
        if sharing is None:
            whole = run_members(members, execution, output, optimizer, has_predict_fn=has_predict_fn)
        else:
            whole = share_weights(members[0], num_members, sharing, output, seed)
        super().__init__(whole if trunk is None else on_trunk(whole, trunk, seed), **training)
        self.seed = seed
        self.bootstrap = bootstrap or "none"
        self.adversary = None if adversarial_epsilon is None else Adversary(adversarial_epsilon, adversarial_scale)
        self.members = Members(self, lightning_members, streams) if lightning_members else None
        self.inferred_task = InferredTask() if self.members is not None and "task" not in training else None
        if self.inferred_task is not None:  # a checkpoint must not store the default as if the user had given it
            for saved in (self._plain_arguments, self.hparams):
                saved.pop("task", None)
        if self.members is not None:
            self.strict_loading = all(member.strict_loading for member in lightning_members)
            vars(self).update(self.members.hooks_of_data())
        self._explains_execution = execution == "auto" and self.members is None
        self.share: MemberShare | None = None

    @classmethod
    def from_checkpoints(
        cls,
        checkpoints: Sequence[str | Path],
        network: Factory | Callable[[], nn.Module] | None = None,
        *,
        module_class: type[LightningModule] | None = None,
        weights_only: bool = True,
        **kwargs: Any,
    ) -> "EnsembleModule":
        """Collect members that were trained separately.

        Args:
            checkpoints: One file per member: a Lightning checkpoint, or only a state dict. A LightningModule loads its checkpoint as in
                Lightning, with its hooks.
            network: Factory of a member: a plain network, or a LightningModule. A plain network also finds its weights under an
                attribute of the LightningModule that wrote the file.
            module_class: The LightningModule that wrote the files, called with their hyper-parameters, instead of ``network``.
                Files of a :class:`DeterministicModule` with an importable factory need neither.
            weights_only: False also reads other objects, such as a network among the hyper-parameters, and runs code in the files.
            kwargs: Further arguments of :class:`EnsembleModule`.

        Raises:
            InputError: A file cannot be read, or does not fit the network that the factory builds.

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
        files, arguments = read_member_files(checkpoints, network, module_class, weights_only, kwargs)
        with ignore_same_start():  # the weights will be replaced
            ensemble = cls(**arguments)
        load_member_files(ensemble, files, checkpoints)
        return ensemble

    def look_at_task(self, x: Any, y: object, *, is_training: bool = False) -> bool:
        """Look for the members' task in a batch if no task was given; return whether the task changed. A training batch may raise a doubt."""
        if self.inferred_task is None or self.members is None:
            return False

        def outputs() -> Tensor:
            try:
                found: Tensor = self.network(batches.own_batch(x))  # a copy: `forward` may change it in place
            except RuntimeError as error:
                self._explain(error, x)
                raise
            return found

        changed = self.inferred_task.look(self.members.modules[0], outputs, y, doubts_default=is_training)
        if changed:
            self.follow_inferred_task()
        return changed

    def follow_inferred_task(self) -> None:
        """Take over the inferred task, which batches (of any rank) or a checkpoint have shown."""
        if self.inferred_task is not None:
            self.task = self.inferred_task.task
            self._output_checked = self._targets_checked = False

    def prediction(self, output: Tensor) -> Prediction:
        """Return the prediction for outputs [Z, B, ...].

        Raises:
            InputError: No task was given, and the members' batches contradict the default.
        """
        inferred = self.inferred_task
        if inferred is not None and inferred.doubt is not None:
            default = (
                f"The members' outputs would be read with `task={describe(self.task)}`, but their batches do not fit it. "
                f"{inferred.doubt} Pass argument `task`."
            )
            raise InputError(inferred.contradiction or default)
        return super().prediction(output)

    # ------------------------------------------------------------------ training

    def setup(self, stage: str) -> None:
        """Log how the members run, and agree on one seed for all ranks."""
        if stage == "fit":
            if self._explains_execution:
                rank_zero_info(self.network.execution_reason)
                self._explains_execution = False
            check_averaging(self.network, self.trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector
        self.seed = self.trainer.strategy.broadcast(self.seed)
        super().setup(stage)

    def on_train_start(self) -> None:
        """Measure the range of the inputs, if it is the unit of adversarial steps."""
        super().on_train_start()
        if self.adversary is not None:
            self.adversary.measure(self, self.unpack_batch)

    def train_members(self, members: range | None, *, data_parallel_size: int = 1) -> None:
        """Let this process train these members alone, as :class:`MemberParallelStrategy` does; None: all members again."""
        self.share = None if members is None else MemberShare(self.network, members, data_parallel_size)

    @property
    def trained_network(self) -> EnsembleNetwork:
        """The members that this process trains: all of them, or its share under :class:`MemberParallelStrategy`."""
        return self.network if self.share is None else self.share.network

    def training_loss(self, x: Any, y: Tensor, batch: Any) -> Tensor:
        """Sum of the losses of the members that this process trains."""
        return self.regularized(sum_of_losses(self, self.share, x, y, batch), x)

    def regularized(self, loss: Tensor, x: Any) -> Tensor:
        """The training loss plus the ``regularizer`` of the members that this process trains, if there is one."""
        return loss if self.regularizer is None else loss + self.regularizer(self.trained_network, x)

    def reported_loss(self, loss: Tensor) -> Tensor:
        """Mean of the members' losses; of all processes' members, a collective under :class:`MemberParallelStrategy`."""
        return loss / self.network.num_indices if self.share is None else self.share.mean_loss(loss)

    def _log_training(self, loss: Tensor, num_rows: int | None) -> None:
        log = partial(super()._log_training, loss, num_rows)
        log() if self.share is None else self.share.when_complete(log)

    def targets(self, y: Tensor, batch: Any, index: Tensor) -> Targets:
        """Targets and weights from ``data_noise`` and ``bootstrap``, whose weights are multiplied."""
        found = super().targets(y, batch, index)
        if self.bootstrap == "none":
            return found
        sample = batches.known_sample_index(batch, f"bootstrap={self.bootstrap!r}").to(self.device)
        return found.times(bootstrap_weights(sample, index, self.seed, self.bootstrap))

    # ------------------------------------------------------------------ evaluation

    def _log_before_batches(self, stage: str, metric_sets: nn.ModuleList) -> None:
        if self.members is None:
            super()._log_before_batches(stage, metric_sets)
        else:
            self.members.metrics.start(stage, metric_sets)
            self._logged_loaders = set(range(len(metric_sets))) if self.members.metrics.are_logged_at_end else set()

    def _evaluate(
        self, stage: str, metric_sets: nn.ModuleList, loaders: list[Any], batch: Any, batch_idx: int, loader_idx: int
    ) -> None:
        if self.members is None:
            super()._evaluate(stage, metric_sets, loaders, batch, batch_idx, loader_idx)
            return
        self.members.steps.evaluation_step(stage, batch, batch_idx, loader_idx)
        evaluate = partial(super()._evaluate, f"ensemble/{stage}", metric_sets, loaders, batch, batch_idx, loader_idx)
        with in_eval_mode(self):  # a member may choose train mode for its own steps, which would update BatchNorm
            self.members.metrics.update(batch, loader_idx, evaluate)

    # ------------------------------------------------------------------ optimizer

    @property
    def gradient_scaler(self) -> Any:
        """The Trainer's gradient scaler, or None."""
        return getattr(getattr(trainer_of(self), "precision_plugin", None), "scaler", None)

    def optimized_parameters(self) -> list[Any]:
        """One parameter group per member, or one group of stacked parameters."""
        # Members that other processes train keep their groups in a loop, so that schedulers see the same groups everywhere.
        network = self.trained_network if self.network.is_stacked else self.network
        groups = [[p for p in group if p.requires_grad] for group in network.parameter_groups()]
        return [{"params": group} for group in groups if group]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each member's gradient separately."""
        if not gradient_clip_val:
            return
        if self.gradient_scaler is not None and optimizer_handles_unscaling(optimizer):
            raise UnsupportedError(
                f"{type(optimizer).__name__} unscales gradients inside its own step, which is after clipping. Remove "
                "`fused=True` or `gradient_clip_val`."
            )
        self.trained_network.clip_gradients_per_member(gradient_clip_val, gradient_clip_algorithm or "norm")

    # ------------------------------------------------------------------ checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the seed and the members' execution."""
        super().on_save_checkpoint(checkpoint)
        known = self.inferred_task or InferredTask()
        seen = {"inferred_task": known.name, "task_doubt": known.doubt}
        own = {"seed": self.seed, "num_members": self.network.num_indices, "stacked": self.network.is_stacked}
        checkpoint[ENSEMBLE_STATE] = own | {name: value for name, value in seen.items() if value is not None}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the seed, and convert an optimizer state of another execution."""
        super().on_load_checkpoint(checkpoint)
        if (saved := checkpoint.get(ENSEMBLE_STATE)) is None:
            return
        check_size(checkpoint, self.network.num_indices)
        self.seed = saved["seed"]
        if self.inferred_task is not None:  # otherwise a task was passed when loading
            self.inferred_task = InferredTask(saved.get("inferred_task"), saved.get("task_doubt"))
            self.follow_inferred_task()
        if self.is_resuming:
            if self.adversary is not None:
                self.adversary.resume(checkpoint["state_dict"])
            if saved["stacked"] != self.network.is_stacked:
                convert_states(checkpoint, self.network.num_indices, stack=self.network.is_stacked)
