"""The processes of a run: who we are among them, how the model lies over them, and what they say to each other.

Parallelism is torch's own (DistributedDataParallel, fully_shard, DTensor) on one DeviceMesh with the dimensions data x
shard x tensor, and is applied from outside the model. One process is the default and needs no process group; under
`torchrun` the group is joined from the environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from cairn import device as devices
from cairn.checkpoint.saving.peers import Group, Peers
from cairn.errors import InputError, InterruptedRun, WorkerError
from cairn.training.recipe import started_processes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from cairn.training.recipe import Parallel, Recipe

PARENT_DEATH_SIGNAL = 1
"""Option of prctl(2)."""
INTERRUPTED = 130
"""Exit status of a process that was asked to end."""
DIMENSIONS = ("data", "shard", "tensor")


@dataclass(frozen=True)
class World:
    """This process among those of the run: `rank` of `size`, computing on `device`.

    `replicas` are the shares into which a batch is cut, of which this process computes number `replica`; the processes of
    one tensor-parallel group compute the same share together.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    sharded: bool = False
    float64_sums: bool = False
    groups: list[dist.ProcessGroup] = field(default_factory=list)
    """Made for this run, beside the one in which it began."""

    @property
    def first(self) -> bool:
        """Whether this is the process that reports."""
        return self.rank == 0

    @property
    def replicas(self) -> int:
        return self.mesh.size(0) * self.mesh.size(1) if self.mesh is not None else 1

    @property
    def replica(self) -> int:
        if self.mesh is None:
            return 0
        data, shard, _ = self.mesh.get_coordinate() or (0, 0, 0)
        return data * self.mesh.size(1) + shard

    @property
    def gradient_factor(self) -> int:
        """What a share of a sum is multiplied by before its backward pass: torch averages gradients over the replicas, float64 sums add them."""
        return 1 if self.float64_sums else self.replicas

    @functools.cached_property
    def peers(self) -> Peers:
        """All processes, for what they agree on beside training; for the thread that trains."""
        return self.more_peers()

    def more_peers(self) -> Peers:
        """The same over another connection, for another thread: what two threads say must not mix."""
        return Group(self._new_group()) if self.size > 1 else Peers()

    @functools.cached_property
    def host_group(self) -> dist.ProcessGroup:
        """All processes, for numbers that lie on the host; for the thread that trains."""
        return self._new_group()

    def _new_group(self) -> dist.ProcessGroup:
        group = dist.new_group(backend="gloo")
        self.groups.append(group)
        return group

    def close(self) -> None:
        """Let go of the groups that were made for this run inside a process group that others go on using."""
        made = [*self.groups, *(self.mesh.get_all_groups() if self.mesh is not None else [])]
        if "_replicas_group" in self.__dict__:
            made.append(self._replicas_group)
        self.groups.clear()
        for group in {id(group): group for group in made}.values():
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over the replicas, in float64."""
        if self.mesh is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self._replicas_group)
        return total.tolist()

    def host_sums(self, values: Sequence[float]) -> list[float]:
        """The same of numbers that lie on the host, without asking a GPU anything."""
        if self.mesh is None or self.device.type == "cpu":
            return self.sums(values)
        # The processes of one tensor-parallel group hold the same numbers: one of them counts.
        counts = (self.mesh.get_coordinate() or (0, 0, 0))[2] == 0
        total = torch.tensor(values, dtype=torch.float64) * counts
        dist.all_reduce(total, group=self.host_group)
        return total.tolist()

    def device_sums(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sums of a float64 tensor over the replicas; it stays where it is."""
        if self.mesh is not None:
            dist.all_reduce(values, group=self._replicas_group)
        return values

    def staged(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in host memory from which a GPU copies by itself."""
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def gathered(self, values: torch.Tensor) -> torch.Tensor:
        """The values (n,) of every replica, in the replicas' order: (replicas * n,)."""
        if self.mesh is None:
            return values
        pieces = [torch.empty_like(values) for _ in range(self.replicas)]
        dist.all_gather(pieces, values.contiguous(), group=self._replicas_group)
        return torch.cat(pieces)

    @functools.cached_property
    def _replicas_group(self) -> dist.ProcessGroup:
        assert self.mesh is not None
        return self.mesh["data", "shard"]._flatten("replicas").get_group()

    def any(self, flag: bool) -> bool:
        """Whether it is so in some process."""
        if self.size == 1:
            return flag
        found = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found.item())

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def first_before_others(self) -> Iterator[None]:
        """What is done inside, the first process has finished when the others begin: it fills caches for them."""
        if not self.first:
            self.barrier()
        yield
        if self.first:
            self.barrier()

    def share(self, count: int) -> tuple[int, int]:
        """Begin and end of this process's contiguous share of `count` items."""
        return self.replica * count // self.replicas, (self.replica + 1) * count // self.replicas

    def place(self, model: nn.Module, enter: Callable[[nn.Module], object] = lambda model: None) -> nn.Module:
        """Lay a model (on the meta device, so that no process ever holds all of it) over the mesh. `enter` sees it when its matrices are
        cut over the tensor-parallel processes and nothing is sharded yet."""
        if self.mesh is not None and self.mesh.size(2) > 1:
            _cut_matrices(model, self.mesh["tensor"])
        enter(model)
        if self.mesh is None or not self.sharded:
            return model
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = self.mesh["data", "shard"]
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float64 if self.float64_sums else None)
        for module in (*model.blocks(), model):  # type: ignore[operator]
            shared = fully_shard(module, mesh=mesh, mp_policy=policy)  # type: ignore[arg-type]
            if self.float64_sums:
                shared.set_gradient_divide_factor(1.0)
        return model

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module whose forward and backward are shared with the other processes."""
        if self.mesh is None or self.sharded or self.float64_sums:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    @contextlib.contextmanager
    def accumulating(self, forward: nn.Module, last: bool) -> Iterator[None]:
        """Around a forward and backward pass. Gradients cross processes only in the last one of an update."""
        if self.sharded:
            forward.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield
        elif self.float64_sums:
            yield
            self._sums.add(forward.parameters())
            if last:
                self._sums.finish()
        elif last or self.mesh is None:
            yield
        else:
            with forward.no_sync():  # type: ignore[operator]
                yield

    @functools.cached_property
    def _sums(self) -> GradientSums:
        return GradientSums(self._replicas_group if self.mesh is not None else None)


class GradientSums:
    """Gradients added up in float64, over backward passes and over the processes of a group, and rounded once to the weights' dtype.

    The order of additions then makes a difference only where a sum lies within float64's error of the middle between two values of that dtype.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._sums: dict[nn.Parameter, torch.Tensor] = {}

    def add(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the gradients of `parameters` into the sums."""
        for parameter in parameters:
            if parameter.grad is not None:
                known = self._sums.get(parameter)
                self._sums[parameter] = parameter.grad.double() if known is None else known.add_(parameter.grad)
                parameter.grad = None

    def finish(self) -> None:
        """Give each parameter the sum as its gradient, and forget the sums."""
        for parameter, total in self._sums.items():
            if self._group is not None:
                dist.all_reduce(total, group=self._group)
            parameter.grad = total.to(parameter.dtype)
        self._sums = {}


def _cut_matrices(model: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallelism of every block: heads and the inner dimension of the MLP are spread over the processes.

    Embedding, norms and head stay whole ("Megatron-LM", 1909.08053, section 3).
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

    plan: dict[str, ParallelStyle] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan["self_attn.o_proj"] = RowwiseParallel()
    for number, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
        experts = model.architecture.experts_of(number)  # type: ignore[union-attr, operator]
        inner = "mlp" if experts is None else f"{model.architecture.mlp_name}.experts.*"  # type: ignore[union-attr]
        gate, up, down = ("gate_proj", "up_proj", "down_proj") if experts is None else experts.names
        plan |= {f"{inner}.{gate}": ColwiseParallel(), f"{inner}.{up}": ColwiseParallel(), f"{inner}.{down}": RowwiseParallel()}
        norms = {f"self_attn.{name}_norm": _norm_over_all_heads() for name in "qk" if list(getattr(layer.self_attn, f"{name}_norm").parameters())}
        parallelize_module(layer, mesh, plan | norms)


def _norm_over_all_heads() -> Any:
    """The style of a norm that spans the heads of all processes, of which each brings its own."""
    from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
    from torch.distributed.tensor.parallel import ParallelStyle

    class HeadNorm(ParallelStyle):
        def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
            return distribute_module(module, device_mesh, self._cut, self._enter, self._leave)  # type: ignore[arg-type]

        @staticmethod
        def _cut(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
            module.weight = nn.Parameter(distribute_tensor(module.weight, mesh, [Shard(0)]))  # type: ignore[arg-type]

        @staticmethod
        def _enter(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            return (DTensor.from_local(inputs[0], mesh, [Shard(inputs[0].dim() - 1)]),)

        @staticmethod
        def _leave(module: nn.Module, output: Any, mesh: DeviceMesh) -> torch.Tensor:
            return output.redistribute(mesh, [Shard(output.dim() - 1)]).to_local()

    return HeadNorm()


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Scale the gradients so that their norm over the whole model is at most `limit`; returns the norm before, where they lie.

    Squares are added up in `dtype`, by default in that of the gradients. Parameters may lie on different meshes (some cut over
    tensor-parallel processes, some not): each mesh gives the norm of its own, and their squares add up.
    """
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    norms = [_norm([p.grad for p in group if p.grad is not None], dtype) for group in groups.values()]
    if not norms:
        return torch.zeros(())
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).square().sum().sqrt()
    if dtype is not None:
        norm = norm.float()
    if math.isfinite(limit):
        for group in groups.values():
            torch.nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


def _norm(gradients: Sequence[torch.Tensor], dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None:
        return _whole(torch.nn.utils.get_total_norm(gradients))
    return _whole(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient, dtype=dtype) for gradient in gradients])))


def _whole(norm: torch.Tensor) -> torch.Tensor:
    full = getattr(norm, "full_tensor", None)
    return norm if full is None else full()


@contextlib.contextmanager
def joined(recipe: Recipe) -> Iterator[World]:
    """The world of a recipe's run; the process group, where one is needed, lives as long as the context.

    Raises `InputError` when another number of processes was started, or the model cannot be cut as asked.
    """
    parallel, started = recipe.parallel, started_processes()
    if started != parallel.processes:
        raise InputError(
            f"The recipe asks for {parallel.processes} process(es) (parallel.data x shard x tensor) and {started} were started; "
            f"start it with `torchrun --nproc-per-node {parallel.processes} -m cairn ...` or change the product."
        )
    _refuse_uneven(recipe)
    device = _device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    exact = recipe.training.gradient_sums == "float64"
    if started == 1:
        yield World(device=device, float64_sums=exact)
        return
    if os.environ.get("TORCHELASTIC_RUN_ID"):
        _end_with_launcher()
    ours = not dist.is_initialized()
    if ours:
        _meet("nccl" if device.type == "cuda" else "gloo")
    world = _world(parallel, device, exact)
    try:
        yield world
    finally:
        if ours:
            dist.destroy_process_group()
        else:
            world.close()


def _device() -> torch.device:
    """Where this process trains. Raises `InputError` for an accelerator that was asked for and cannot add up in float64, as training does."""
    found = devices.choose()
    if found.type == "cuda":
        return torch.device("cuda", found.index or 0)
    if found.type != "cpu" and devices.asked() is not None:
        raise InputError(f"Training adds up in float64, which '{found}' does not have; --device cpu (device='cpu') trains on the processor.")
    return torch.device("cpu")


def _end_with_launcher() -> None:
    """A worker whose launcher is killed is asked to end, as by a termination: it saves and leaves instead of training on unseen."""
    try:
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)
    except (OSError, AttributeError):
        return  # only Linux tells a process that its parent has died


def _meet(backend: str) -> None:
    """Join the process group of this attempt. torchrun may keep one store for all attempts, and the addresses that processes now
    dead have left in it must not be taken for those of the living."""
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    attempt = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-of-{size}", store)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=size)


def _world(parallel: Parallel, device: torch.device, float64_sums: bool) -> World:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (parallel.data, parallel.shard, parallel.tensor), mesh_dim_names=DIMENSIONS)
    sharded = parallel.shard > 1 or parallel.tensor > 1
    return World(dist.get_rank(), dist.get_world_size(), device, mesh, sharded, float64_sums)


def _refuse_uneven(recipe: Recipe) -> None:
    """Tensor parallelism gives every process whole heads and an equal part of the MLP."""
    ways, model = recipe.parallel.tensor, recipe.model
    if ways == 1:
        return
    if not model.cuts_by_tensor:
        raise InputError(f"parallel.tensor={ways} does not cut a '{model.model_type}'; use parallel.shard, which cuts anything.")
    inner = {each.size if each is not None else model.intermediate_size for each in map(model.experts_of, range(model.num_hidden_layers))}
    sizes = [("heads", model.num_attention_heads), ("key-value heads", model.key_value_heads), *(("inner MLP dimensions", size) for size in sorted(inner))]
    for key, size in sizes:
        if size % ways:
            raise InputError(f"parallel.tensor={ways} does not divide the model's {size} {key}; use parallel.shard, which cuts anything.")


def launch(processes: int, arguments: Sequence[str], restarts: int = 0) -> None:
    """Run `cairn ARGUMENTS` in `processes` workers on this machine, as `torchrun` does, and wait for them."""
    from torch.distributed.run import parse_args, run

    settings = parse_args(["--standalone", "--nproc-per-node", str(processes), "--max-restarts", str(restarts), "-m", "cairn"])
    settings.training_script_args = list(arguments)  # given here, since torchrun would read some of them as its own options
    run(settings)


def launched_instead(parallel: Parallel) -> bool:
    """Where a recipe wants several processes and this one was not started by `torchrun`: let workers do this command line.

    Whether they did, in which case nothing is left to do here. Raises `CairnError` if a worker failed for good.
    """
    if parallel.processes == 1 or os.environ.get("WORLD_SIZE"):
        return False
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch(parallel.processes, sys.argv[1:], parallel.restarts)
    except (SignalException, KeyboardInterrupt):
        raise InterruptedRun("interrupted; its processes say above what is saved") from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == INTERRUPTED:
            raise InterruptedRun("interrupted; its processes say above what is saved") from None
        status = failure.exitcode if failure.exitcode in (1, 2) else 2
        raise WorkerError(f"Process {rank} of {parallel.processes} ended with status {failure.exitcode}; it says why above.", status) from None
    return True


@contextlib.contextmanager
def explained(world: World, micro_batch: int | None, share: int) -> Iterator[None]:
    """Turn what torch raises when memory or another process is lost into one sentence. `share`: units of a batch that this process computes."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "not enough memory" in text:
            smaller = max(1, (micro_batch or share) // 2)
            raise InputError(
                f"There is not enough memory for a forward and backward pass over {micro_batch or share} tokens or samples at once: set "
                f"training.micro_batch={smaller}, which changes nothing that is computed, or spread the model (parallel.shard)."
            ) from error
        if world.size > 1 and (isinstance(error, dist.DistError) or "gloo" in text or "Connection closed by peer" in text):
            raise WorkerError(f"Process {world.rank} has lost another process of this run, which says why.") from error
        raise


def started_again() -> bool:
    """Whether `torchrun` has started the processes again because one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0
