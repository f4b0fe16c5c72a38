"""IMM for the diffusers library, an extra: a network, a scheduler and a pipeline that it can save, load and run.

The network's settings are those of one of ``imm.networks``; everything else that a flow map has (its ``settings``) and the time
grid are the scheduler's. The two together make an :class:`imm.FlowMap`, which is what :class:`IMMPipeline` samples from.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imm import functional, latents
from imm.checkpoints.format import describe
from imm.flow_map import FlowMap
from imm.integrations.autoencoder import NEEDED
from imm.networks import NETWORKS
from imm.pictures import to_picture, to_pillow
from imm.sampling.grid import StepTable, step_table, time_grid
from imm.sampling.loop import checked_guidance, initial_state, jump, step, with_none
from imm.sampling.sampler import Sampler, as_labels
from imm.schedules import Time, as_time
from imm.weights import is_aligned, own_memory, own_names, plain_names, unwrapped

try:
    import diffusers
    from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerOutput
except ImportError as error:
    raise ImportError(f"imm.integrations.diffusers: {NEEDED}") from error

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
FLOW_MAP_SETTINGS = ("schedule", "parametrization", "second_time", "sigma_data", "time_scale", "t_min", "t_max")


class IMMNetwork(ModelMixin, ConfigMixin):
    """A network of ``imm.networks`` as a diffusers model.

    Args:
        name: "DDPMpp", "DiT" or "UNet". settings: its constructor's arguments.

    Raises:
        ValueError, TypeError: an unknown name, or settings that the network does not take.
    """

    @register_to_config
    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        super().__init__()
        if name not in NETWORKS:
            raise ValueError(f"name: expected one of {sorted(NETWORKS)}, got {name!r}")
        self.net = NETWORKS[name](**settings)

    @classmethod
    def around(cls, network: nn.Module) -> IMMNetwork:
        """The model that holds this very network, one of ``imm.networks``. Raises ValueError for another."""
        settings = dict(describe(FlowMap(network))["network"])
        name = settings.pop("name")
        if name not in NETWORKS:
            raise ValueError(f"network: expected one of {sorted(NETWORKS)}, got {type(network).__name__}")
        with torch.device("meta"):
            model = cls(name=name, settings=settings)
        model.net = unwrapped(network)
        return model.train(network.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """As in diffusers, but weights that are missing, or are not the network's, are an error (ValueError)."""
        want_info = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **options)
        missing, unknown = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        if missing or unknown:
            source = pretrained_model_name_or_path
            raise ValueError(f"{source}: names do not fit the network: missing {missing[:4]}, unknown {unknown[:4]}")
        if options.get("device_map") is None:
            model.net = _laid_out(model.net, model.config)
        else:  # its modules may hang on hooks, which a new network would not have
            own_memory(model.net)
        return (model, info) if want_info else model

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """As in torch, but without the names of torch.compile's wrappers, which no file should have."""
        return plain_names(super().state_dict(*args, **options))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; names of compiled parts or without, whatever is compiled here."""
        return super().load_state_dict(own_names(self, state_dict), strict, assign)

    def forward(self, sample: Tensor, timestep: Time, second_timestep: Time, class_labels: Tensor | None = None) -> Tensor:
        """The network's output G.

        Args:
            sample: ``[B, C, H, W]``, from :meth:`IMMScheduler.scale_model_input`, in the network's dtype.
            timestep, second_timestep: one of ``scheduler.timesteps`` and its ``scheduler.second_timestep``, or ``[B]`` of each.
            class_labels: ``[B]`` int64, ``num_classes`` meaning "none"; None for an unconditional network.

        Returns:
            ``[B, C, H, W]``: what :meth:`IMMScheduler.step` takes.
        """
        t, s = (as_time(v, sample.device).expand(len(sample)) for v in (timestep, second_timestep))
        return self.net(sample, t, s, class_labels)


def _laid_out(net: nn.Module, config: Any) -> nn.Module:
    """``net`` in memory as its constructor lays it out.

    What diffusers loads lies as in the file: at addresses that are not aligned and never channels-last, for which libraries
    choose other, often slower, kernels and other last bits.
    """
    first = next(net.parameters())
    with torch.device("meta"):
        made = NETWORKS[config.name](**config.settings)
    made = made.to(first.dtype).to_empty(device=first.device)
    made.load_state_dict(net.state_dict())  # all of it: no buffer is left out of the state
    return made.train(net.training)


class _Formulas(nn.Module):
    """In place of a network, where only a flow map's formulas are wanted."""

    num_classes = 0


class IMMScheduler(SchedulerMixin, ConfigMixin):
    """The steps of a flow map: :mod:`imm.sampling` in the words of diffusers.

    Args:
        schedule, parametrization, second_time, sigma_data, time_scale, t_min, t_max: as in :class:`imm.FlowMap`.
        kind, mid_eta: the time grid (:func:`imm.sampling.time_grid`).
        method: "pushforward" (paper algorithm 2), "restart" (algorithm 5) or "ddim".

    Attributes:
        timesteps: ``[steps]`` float64, the first time of each step as the network takes it, ``time_scale * t``.
        init_noise_sigma: what standard normal noise is multiplied by to begin with, sigma_data.

    Raises:
        ValueError: values other than these.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        schedule: str = "fm",
        parametrization: str = "euler_fm",
        second_time: str = "stride",
        sigma_data: float = 0.5,
        time_scale: float = 1000.0,
        t_min: float = 0.0,
        t_max: float = 0.994,
        kind: str = "uniform",
        mid_eta: Sequence[float] = (),
        method: str = "pushforward",
    ) -> None:
        self.flow_map_settings: dict[str, Any] = {name: self.config[name] for name in FLOW_MAP_SETTINGS}
        self.init_noise_sigma = sigma_data
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0, dtype=torch.float64)
        self._table: StepTable | None = None
        self._made_table(len(mid_eta) + 1 if kind == "eta" else 1, kind, mid_eta)

    def _made_table(self, steps: int, kind: str, mid_eta: Sequence[float]) -> StepTable:
        flow_map = FlowMap(_Formulas(), **self.flow_map_settings)
        if self.config.method == "heun":
            raise ValueError("method: expected pushforward, restart or ddim in a scheduler, got 'heun'")
        return step_table(flow_map, time_grid(flow_map, steps, kind, mid_eta), self.config.method)

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | str | None = None,
        *,
        kind: str | None = None,
        mid_eta: Sequence[float] = (),
    ) -> None:
        """Choose the time grid.

        Args:
            num_inference_steps: jumps, >= 1. device: of ``timesteps``.
            kind, mid_eta: in place of the scheduler's own.

        Raises:
            ValueError: as :func:`imm.sampling.time_grid`.
        """
        if kind is None and mid_eta:
            raise ValueError('mid_eta: expected a kind beside it, such as "eta", got none')
        chosen = (self.config.kind, self.config.mid_eta) if kind is None else (kind, mid_eta)
        self._table = self._made_table(num_inference_steps, *chosen)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor(self._table.t, dtype=torch.float64, device=device)

    def _step(self, timestep: Time) -> tuple[StepTable, int]:
        """The table, and the step that begins at a timestep."""
        if self._table is None:
            raise ValueError("timesteps: expected set_timesteps to be called first")
        value = float(timestep)
        distance = [abs(t - value) for t in self._table.t]
        index = distance.index(min(distance))
        if not distance[index] <= 1e-6 * self.config.time_scale:  # a float32 copy is as good
            raise ValueError(f"timestep: expected one of {list(self._table.t)}, got {value}")
        return self._table, index

    def second_timestep(self, timestep: Time) -> float:
        """What the network takes beside ``timestep``, one of ``timesteps``. Raises ValueError for another."""
        table, i = self._step(timestep)
        return table.s[i]

    def scale_model_input(self, sample: Tensor, timestep: Time) -> Tensor:
        """The network's input c_in(t) x, in the dtype of ``sample``; ``timestep`` as in :meth:`second_timestep`."""
        table, i = self._step(timestep)
        return sample * table.c_in[i]

    def step(
        self,
        model_output: Tensor,
        timestep: Time,
        sample: Tensor,
        *,
        uncond_output: Tensor | None = None,
        guidance_scale: Time | None = None,
        seeds: Tensor | Sequence[int] | range | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One jump, with the bits of :class:`imm.Sampler`.

        Args:
            model_output: the network's G for ``sample`` and this timestep, ``[B, ...]``.
            timestep: one of ``timesteps``.
            sample: the state x_t, ``[B, ...]``.
            uncond_output, guidance_scale: G without labels and the guidance w (number or ``[B]``), both or neither.
            seeds: the images' seeds, which the method "restart" draws fresh noise from in every step but the last.

        Returns:
            ``SchedulerOutput(prev_sample)``, or ``(prev_sample,)`` where ``return_dict`` is False, in the dtype of ``sample``.

        Raises:
            ValueError: another timestep, shapes that differ, a restart without seeds.
        """
        table, i = self._step(timestep)
        if table.c_noise[i] != 0.0 and seeds is None:
            raise ValueError('seeds: expected the images\' seeds for the method "restart", got None')
        keys = None if seeds is None else functional.as_seeds(seeds, sample.device)
        stepped = jump(table, i, sample, model_output, uncond_output, guidance_scale, keys)
        return SchedulerOutput(prev_sample=stepped) if return_dict else (stepped,)


class IMMPipeline(DiffusionPipeline):
    """Images from class labels with a network, a scheduler and, for networks of latents, an autoencoder.

    ``save_pretrained`` and ``from_pretrained`` write and read folders of safetensors and JSON; nothing in them is executed. The
    hub is asked only where ``from_pretrained`` is given a hub name, or ``push_to_hub`` is called.

    Args:
        network: in evaluation mode. scheduler: of the flow map that the network was trained as.
        vae: AutoencoderKL of as many latent channels as the network has; None: images or latents come as they are.

    Raises:
        TypeError, ValueError: components other than these.
    """

    _optional_components = ["vae"]  # noqa: RUF012  (diffusers' own declaration)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(self, network: IMMNetwork, scheduler: IMMScheduler, vae: AutoencoderKL | None = None) -> None:
        super().__init__()
        _check_components(network, scheduler, vae)
        if vae is not None and not is_aligned(vae):  # as diffusers loads it; another's memory may be known to a graph
            own_memory(vae)
        self.register_modules(network=network, scheduler=scheduler, vae=vae)
        self._sampler: Sampler | None = None
        self._sampler_of: tuple[Any, ...] = ()

    @classmethod
    def from_flow_map(
        cls,
        flow_map: FlowMap,
        *,
        vae: AutoencoderKL | None = None,
        kind: str = "uniform",
        mid_eta: Sequence[float] = (),
        method: str = "pushforward",
    ) -> IMMPipeline:
        """A pipeline around the network of ``flow_map``, which stays the same object.

        Args:
            flow_map: such as :func:`imm.load` gives, of one of ``imm.networks``. vae: as in the class.
            kind, mid_eta, method: as in :class:`IMMScheduler`.

        Raises:
            ValueError: a network that is not one of ``imm.networks``; what the components refuse.
        """
        scheduler = IMMScheduler(**flow_map.settings, kind=kind, mid_eta=list(mid_eta), method=method)
        return cls(network=IMMNetwork.around(flow_map.network), scheduler=scheduler, vae=vae)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """As in diffusers, but of safetensors only unless ``use_safetensors`` says otherwise."""
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True, **options})
        if pipeline.vae is not None and options.get("vae") is None:
            own_memory(pipeline.vae)  # aligned by chance or not: saving to the same folder would write into a mapped file
        return pipeline

    def __getstate__(self) -> dict[str, Any]:
        """Without the sampler: a copy, or what is unpickled, makes its own."""
        return {**self.__dict__, "_sampler": None, "_sampler_of": ()}

    @property
    def flow_map(self) -> FlowMap:
        """The flow map of the network and the scheduler as they are now. Raises what the class does where they do not fit."""
        _check_components(self.network, self.scheduler, self.vae)
        return FlowMap(self.network.net, **self.scheduler.flow_map_settings).train(self.network.net.training)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: Time | None = None,
        num_inference_steps: int = 2,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seeds: Tensor | Sequence[int] | range | None = None,
        *,
        batch_size: int | None = None,
        rows: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> Any:
        """Generate images.

        Args:
            class_labels: one class an image, ``num_classes`` meaning "none", or one for all; None: all "none".
            guidance_scale: classifier-free guidance w (a number or ``[B]``); None: without.
            num_inference_steps: jumps.
            generator: draws each image's seed, an integer in [0, 2^63 - 1); of a list each draws one. None, without seeds:
                torch's default generator.
            seeds: the images' seeds themselves, in place of a generator. An image depends on its own seed and label.
            batch_size: images, where neither seeds nor labels nor a list of generators count them; 1 where nothing does.
            rows: as in :class:`imm.Sampler`: run every batch in this many rows.
            output_type: "pil" images; "np" ``[B, H, W, C]`` or "pt" ``[B, C, H, W]``, both float32 in [0, 1]; "latent": the
                last state, ``[B, C, H, W]`` float32, which is images in [-1, 1] or latents.
            return_dict: False: a tuple.
            callback_on_step_end: called as ``callback(pipeline, step, timestep, {"latents": x})`` after each step; may return
                ``{"latents": x}`` to go on with. Then the scheduler's steps are run one by one.

        Returns:
            ``ImagePipelineOutput`` with ``images``, or ``(images,)``. The bits are those of :meth:`imm.Sampler.sample` for the
            same seeds, labels, guidance and rows; with a callback, to the rounding of a DiT's modulations.

        Raises:
            ValueError, TypeError: arguments other than these; pictures asked of a network of latents without a ``vae``.
        """
        flow_map = self.flow_map
        self._check_output(output_type)
        if rows is not None and callback_on_step_end is not None:
            raise ValueError(f"rows: expected None beside callback_on_step_end, which sees whole batches, got {rows}")
        count = _count(seeds, generator, class_labels, batch_size)
        keys = _drawn(generator, count) if seeds is None else functional.as_seeds(seeds)
        given: Any = class_labels
        given = [int(given)] * count if given is not None and _single(given) else given
        labels = None if given is None else as_labels(given)
        if callback_on_step_end is None:
            images = self._made_sampler(flow_map, num_inference_steps, rows).sample(keys, labels, guidance_scale)
        else:
            images = self._step_by_step(flow_map, num_inference_steps, keys, labels, guidance_scale, callback_on_step_end)
        result = self._shown(images, output_type)
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def _check_output(self, output_type: str) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: expected one of {list(OUTPUT_TYPES)}, got {output_type!r}")
        channels = self.network.net.channels
        if output_type != "latent" and self.vae is None and channels not in (1, 3):
            raise ValueError(
                f'output_type: expected "latent" of a network of {channels} channels without a vae, got {output_type!r}; '
                "for pictures give the pipeline a vae (imm.integrations.autoencoder.load_vae)"
            )

    def _made_sampler(self, flow_map: FlowMap, steps: int, rows: int | None) -> Sampler:
        """The last call's sampler where nothing but seeds, labels and guidance changed."""
        wanted = (self.network.net, self.scheduler, steps, rows)
        known = self._sampler_of
        if self._sampler is None or known[2:] != wanted[2:] or known[0] is not wanted[0] or known[1] is not wanted[1]:
            config = self.scheduler.config
            grid = {"kind": config.kind, "mid_eta": config.mid_eta, "method": config.method}
            self._sampler, self._sampler_of = Sampler(flow_map, steps=steps, rows=rows, **grid), wanted
        return self._sampler

    def _step_by_step(
        self,
        flow_map: FlowMap,
        steps: int,
        seeds: Tensor,
        labels: Tensor | None,
        guidance: Time | None,
        callback: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]],
    ) -> Tensor:
        net, scheduler, device = self.network.net, self.scheduler, self._execution_device
        if net.training:
            raise ValueError("network: expected evaluation mode (network.eval()), got training mode")
        labels = flow_map.checked_labels(labels, len(seeds), seeds.device if labels is None else labels.device)
        w = checked_guidance(flow_map, guidance, len(seeds))
        if w is not None:
            w = w.to(device)
            labels = None if labels is None else with_none(labels, flow_map.num_classes)
        labels, seeds = None if labels is None else labels.to(device), seeds.to(device)
        scheduler.set_timesteps(steps, device=device)
        x = initial_state(flow_map, seeds, flow_map.image_shape)
        network = lambda i, x, t, s, labels, cond: self.network(x, t, s, labels)  # not its net: its own hooks run
        with torch.autocast(device.type, enabled=False):  # as in imm.Sampler
            for i, t in enumerate(self.progress_bar(scheduler.timesteps)):
                table, number = scheduler._step(t)
                x = step(table, number, network, x, labels, w, seeds, flow_map.network_dtype)
                x = (callback(self, i, t, {"latents": x}) or {}).get("latents", x)
        return x

    def _shown(self, images: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return images
        if self.vae is not None:
            images = latents.decode(images, self.vae, batch=1)  # as imm sample: the others do not matter
        if output_type == "pil":
            return [to_pillow(to_picture(image, decoded=self.vae is not None)) for image in images]
        images = (images.float() / 2 + 0.5).clamp(0.0, 1.0)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


def _check_components(network: Any, scheduler: Any, vae: Any) -> None:
    for name, value, expected in (("network", network, IMMNetwork), ("scheduler", scheduler, IMMScheduler)):
        own = unwrapped(value) if isinstance(value, nn.Module) else value
        if not isinstance(own, expected):
            raise TypeError(f"{name}: expected an imm.integrations.diffusers.{expected.__name__}, got {type(own).__name__}")
    if vae is not None and vae.config.latent_channels != network.net.channels:
        got = vae.config.latent_channels
        raise ValueError(f"vae: expected {network.net.channels} latent channels, as the network has, got {got}")


def _count(seeds: Any, generator: Any, class_labels: Any, batch_size: int | None) -> int:
    """How many images are asked for; whatever counts them must agree."""
    if seeds is not None and generator is not None:
        raise ValueError("seeds and generator: expected one of them at most")
    if seeds is not None and _single(seeds):
        raise ValueError(f"seeds: expected one integer an image, [B], got {seeds!r}")
    counts = {
        "seeds": None if seeds is None else len(seeds),
        "generator": None if generator is None or isinstance(generator, torch.Generator) else len(generator),
        "class_labels": None if class_labels is None or _single(class_labels) else len(class_labels),
        "batch_size": batch_size,
    }
    given = {name: count for name, count in counts.items() if count is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"expected as many of each, got {', '.join(f'{name} {count}' for name, count in given.items())}")
    count = next(iter(given.values()), 1)
    if count < 1:
        raise ValueError(f"{next(iter(given))}: expected at least one image, got {count}")
    return count


def _single(value: Any) -> bool:
    return value.dim() == 0 if isinstance(value, Tensor) else not hasattr(value, "__len__")


def _drawn(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> Tensor:
    """One seed an image, on the CPU."""
    if generator is None or isinstance(generator, torch.Generator):
        sources = [(generator, count)]
    else:
        sources = [(one, 1) for one in generator]
    drawn = []
    for source, size in sources:
        if source is not None and not isinstance(source, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator or a list of them, got {type(source).__name__}")
        device = "cpu" if source is None else source.device
        drawn.append(torch.randint(2**63 - 1, (size,), generator=source, device=device).cpu())
    return torch.cat(drawn)


#: ``DiffusionPipeline.from_pretrained`` looks a folder's pipeline up by name in diffusers itself, or runs code from the folder.
diffusers.IMMPipeline = IMMPipeline
