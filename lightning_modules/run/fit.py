"""The subcommands that run a Trainer: fit, validate and test, on LightningCLI."""

import copy
import shlex
import signal
import sys
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from torch import nn

from callbacks.artifacts.callback import ReparameterizeOnSave
from callbacks.curriculum import Curriculum
from callbacks.ema import EMA
from callbacks.progress import EpochLines
from callbacks.report.callback import Report
from callbacks.snapshots import Snapshots
from lightning_modules.data.base import ResumableData
from lightning_modules.data.datamodule import ImageDataModule
from lightning_modules.data.protocol import check_data_module, in_chans, num_classes, require
from lightning_modules.errors import UsageError, message_for_user
from lightning_modules.recipe.classifier import ImageClassifier
from lightning_modules.recipe.quantizing import check_quantization
from lightning_modules.run.check_args import check_folders, validate_duration
from lightning_modules.run.checkpoint_args import (
    check_run_config,
    hyper_parameters,
    load_ckpt_arg,
    prepend_run_config,
)
from lightning_modules.run.config_files import (
    check_configs,
    find_configs,
    option_value,
    value_in_configs,
)
from lightning_modules.run.folder import RunFolder, SaveRunConfig
from lightning_modules.run.hints import Hints
from lightning_modules.run.option_words import spell_out
from lightning_modules.run.parser import Parser, class_parser, class_path, is_class
from lightning_modules.run.resume import Continuation, find_continuation, newest_usable
from lightning_modules.run.summary import evaluation_summary, fit_summary
from lightning_modules.run.trainer import (
    IntLimitTrainer,
    TimmSyncBatchNorm,
    end_with_rank_zero,
    wait_for_rank_zero,
)
from lightning_modules.run.wandb_logger import (
    WandbOptions,
    check_tracking,
    csv_logger,
    end_offline_runs,
    finish_tracking,
    make_loggers,
)
from lightning_modules.run.warning_filters import silence_known_messages
from mobileone import reparameterize
from mobileone.io.plain_arguments import registered_name
from mobileone.io.user_modules import import_user_modules, put_current_folder_on_path
from mobileone.quantization import scheme_of

__all__ = ["TrainingCLI", "run"]


def run(name: str, argv: list[str], cli: "type[TrainingCLI] | None" = None) -> "TrainingCLI":
    """Run `mobileone fit`, `validate` or `test`.

    A configuration is searched by file name, then among those that come with the package. Without
    one, a checkpoint in a run folder is taken with the configuration of that run.

    Args:
        name: The subcommand.
        argv: Its arguments.
        cli: What runs it; None for `TrainingCLI`.

    Returns:
        The command line, with its trainer, model and data module, when it is done.

    Raises:
        SystemExit: With code 2 on arguments or data that cannot be used.
    """
    silence_known_messages()
    put_current_folder_on_path()
    previous = sys.argv
    chosen = cli or TrainingCLI
    try:
        argv = prepend_run_config(find_configs(argv), all_data=name != "fit")
        check_configs(argv)
        # a distributed strategy starts its other processes with this command line
        sys.argv = [*previous[:1], *chosen.program.split()[1:], name, *argv]
        return chosen(
            chosen.model_base,
            chosen.data_base,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveRunConfig,
            trainer_class=IntLimitTrainer,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # the paper's epochs; no table of modules: `before_fit` says what matters
            trainer_defaults={
                "max_epochs": 300,
                "log_every_n_steps": 10,
                "enable_model_summary": False,
                "enable_progress_bar": sys.stdout.isatty(),
            },
            parser_kwargs={"prog": chosen.program, "description": chosen.description},
            parser_class=Parser,
        )
    except Exception as error:
        if (message := message_for_user(error)) is None:
            raise
        print(f"{chosen.program} {name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    finally:
        sys.argv = previous


class TrainingCLI(LightningCLI):
    """LightningCLI with the template's model, data, run folder, loggers and callbacks.

    `--model package.Class` and `--data package.Class` take classes of the user's own, with their
    arguments as `--model.name value` or below `init_args:`. Without them, the template's are meant.

    Precedence: explicit flag, configuration file, hyper-parameters of `--ckpt_path`, default.

    Attributes:
        model_type: What is trained where no class is given; a subclass may train something else.
        data_type: On what.
        model_base: What a class of the user's own must inherit from.
        data_base: The same for the data.
        program: The words before the subcommand.
        description: For the help.
    """

    model_type: type[LightningModule] = ImageClassifier
    data_type: type[LightningDataModule] = ImageDataModule
    model_base: type[LightningModule] = LightningModule
    data_base: type[LightningDataModule] = LightningDataModule
    program = "mobileone"
    description: str | None = None

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods, without predict: a folder of images needs no Trainer."""
        names = LightningCLI.subcommands()
        return {name: names[name] for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections of callbacks, run folder and wandb, and the links."""
        parser.add_argument(
            "--imports",
            type=list[str],
            default=[],
            help="modules of your own to import first, for the networks that they register with "
            "timm, the formats and the runtimes; for example [my_networks]",
        )
        parser.add_argument("--run.root", default="runs", help="folder of all runs")
        parser.add_argument(
            "--run.name",
            type=str | None,
            default=None,
            help="a run writes to <root>/<name>/<time>; null for the model's name",
        )
        parser.add_argument(
            "--resume",
            type=Literal["auto", "never"],
            default="never",
            help="auto: fit continues the newest run of this name that trains the same, if there "
            "is one, from its newest usable checkpoint; --ckpt_path goes before it",
        )
        parser.add_class_arguments(WandbOptions, "wandb")
        parser.add_lightning_class_args(EMA, "ema")
        self.add_task_arguments(parser)
        parser.add_lightning_class_args(Snapshots, "snapshots")
        parser.link_arguments(
            "data", "model.init_args.num_classes", self.count_classes, apply_on="instantiate"
        )

    def add_task_arguments(self, parser: LightningArgumentParser) -> None:
        """Add what is the task's own: a `checkpoint` section at least."""
        parser.add_lightning_class_args(ReparameterizeOnSave, "checkpoint")
        parser.add_lightning_class_args(Curriculum, "curriculum")
        parser.add_lightning_class_args(Report, "report")
        parser.link_arguments("model.init_args.model", "data.init_args.model")
        parser.link_arguments("data", "model.init_args.in_chans", in_chans, apply_on="instantiate")

    @staticmethod
    def count_classes(data: LightningDataModule) -> int:
        """How many classes the data have, once they are known to be what the task needs.

        Raises:
            ValueError: They lack something; the message says what it is for.
        """
        return len(check_data_module(data).class_names)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with the checkpoint's hyper-parameters as defaults of the model's arguments."""
        checkpoint = option_value(sys.argv, "--ckpt_path")
        model, data = _given_class("model", sys.argv), _given_class("data", sys.argv)
        self.known: dict[str, Any] = {}
        if checkpoint is not None:
            command = f"{self.program} fit"
            self.known = hyper_parameters(checkpoint, model, self.model_type, command)
        # of the classes that are meant: else arguments of the template's would be theirs
        defaults = {
            "model": {"class_path": model or class_path(self.model_type), "init_args": self.known},
            "data": {"class_path": data or class_path(self.data_type)},
        }
        for subparser in self._subcommand_parsers.values():
            subparser.set_defaults(defaults)
        # as LightningCLI does, less the program's own words
        words = sys.argv[len(self.program.split()) :]
        if words[0] in self._subcommand_parsers:
            sections = (
                class_parser("model", model or class_path(self.model_type)),
                class_parser("data", data or class_path(self.data_type)),
            )
            words = spell_out(words, self._subcommand_parsers[words[0]], *sections)
        self.config = parser.parse_args(words)
        self.continued = Continuation(None, None, ())
        config = self.config[self.config.subcommand]
        automatic = self.config.subcommand == "fit" and config.resume == "auto"
        if automatic and config.ckpt_path is None and not config.trainer.fast_dev_run:
            self._resume(config)

    def _resume(self, config: Namespace) -> None:
        """Decide what to resume, and pass it to the processes that are started with our command."""
        parent = RunFolder.parent(config.run.root, _run_name(config))
        defaults = self._subcommand_parsers["fit"].get_defaults(skip_validation=True)
        self.continued = find_continuation(
            parent, yaml.safe_load(self._dump(config)), yaml.safe_load(self._dump(defaults))
        )
        rank_zero_only(print)(*self.continued.notes, sep="\n")
        sys.argv += ["--resume", "never"]
        if self.continued.checkpoint is not None:
            config.ckpt_path = str(self.continued.checkpoint)
            sys.argv += ["--ckpt_path", config.ckpt_path]

    def _dump(self, config: Namespace) -> str:
        parser = self._subcommand_parsers["fit"]
        return parser.dump(config, skip_none=False, skip_validation=True)

    def _parse_ckpt_path(self) -> None:
        """Not as LightningCLI does, which lets the checkpoint override explicit flags."""

    def before_instantiate_classes(self) -> None:
        """Check what the arguments alone show, and import the user's modules."""
        config = self.config[self.subcommand]
        pretrained = config.get("model.init_args.pretrained")
        if self.subcommand != "fit" and config.ckpt_path is None and not pretrained:
            raise UsageError(
                f"--ckpt_path is needed: there is nothing to {self.subcommand}; give a checkpoint, "
                "for example runs/quickstart/latest/checkpoints/best.ckpt, or --model.pretrained "
                "true for timm's weights"
            )
        name = config.get("model.init_args.model")
        trained = self.known.get("model", name)
        if name is not None and registered_name(trained) != registered_name(name):
            raise UsageError(
                f"the checkpoint {config.ckpt_path} holds a {trained}, not a {name}: "
                f"leave --model.model out or set it to {trained}"
            )
        if self.subcommand == "fit":
            contents = None if config.ckpt_path is None else load_ckpt_arg(config.ckpt_path)
            validate_duration(config, contents)
        config.weights_only = True  # a checkpoint holds tensors and primitives, nothing to run
        import_user_modules(config.imports)

    def instantiate_classes(self) -> None:
        """As LightningCLI does; an error of a class is not wrapped in one about its type."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException = error
            while cause.__cause__ is not None and str(cause).startswith(_WRAPPED):
                cause = cause.__cause__
            if cause is error:
                raise
            raise cause from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Choose the run folder, when the data are known to be good, and what is written there."""
        self.count_classes(self.datamodule)  # a model that does not ask for it needs them too
        self._check_options_of_the_data()
        loader = {"fit": "train", "validate": "val", "test": "test"}[str(self.subcommand)]
        require(self.datamodule, f"{loader}_dataloader")
        if self.subcommand == "fit" and self.config["fit"].get("curriculum.phases"):
            require(self.datamodule, "set_curriculum")
        if isinstance(self.datamodule, ResumableData):  # others may need the Trainer
            self.datamodule.setup(str(self.subcommand))
        self.run = None
        config = self.config[self.subcommand]
        if config.trainer.sync_batchnorm:
            kwargs["sync_batchnorm"] = False
            kwargs["plugins"] = [*_listed(config.trainer.plugins), TimmSyncBatchNorm()]
        own_logger = config.trainer.logger not in (None, True)
        if not own_logger:
            kwargs["logger"] = False
        if not config.trainer.fast_dev_run:
            options = self._get(self.config_init, "wandb")
            check_tracking(options)
            saver = self._get(self.config_init, "checkpoint")
            if self.subcommand == "fit":  # else a folder is made for none
                self._check_fit(config, saver)
            self.run = self._run_folder()
            kwargs["default_root_dir"] = str(self.run.path)
            saver.dirpath = saver.dirpath or str(self.run.checkpoints)
            if not own_logger:
                kwargs["logger"] = make_loggers(self.run, options)
            elif config.trainer.logger:  # the curves of the run folder stay, whoever else has them
                given = self._get(self.config_init, "trainer").logger
                kwargs["logger"] = [*_listed(given), csv_logger(self.run)]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except Exception:
            if self.run is not None and self.run != self.continued.run:
                self.run.discard()
            raise
        end_with_rank_zero(trainer)
        if self.subcommand == "fit":
            cast(Any, trainer).callbacks[:0] = [EpochLines(), Hints()]
        return trainer

    def _check_fit(self, config: Namespace, saver: Any) -> None:
        """Find out whether the fit can begin and its artifacts be written."""
        check_folders(config)
        if isinstance(saver, ReparameterizeOnSave):
            saver.check_network(self.model)
            if type(self.model) is ImageClassifier and not config.trainer.callbacks:
                saver.check_names(self.model.logged_names())  # others may log what they like
        if isinstance(self.model, ImageClassifier):
            self.model.check_optimizer()
            resumed, synchronized = config.ckpt_path is not None, config.trainer.sync_batchnorm
            check_quantization(self.model.hparams, resumed=resumed, synchronized=synchronized)
            self.model.load_teacher(self.datamodule.data_config)

    def _check_options_of_the_data(self) -> None:
        """Refuse options of the model that the data decide, where they say something else.

        Raises:
            UsageError: One does.
        """
        for name, count in (("num_classes", self.count_classes), ("in_chans", in_chans)):
            given = option_value(sys.argv, f"--model.{name}")
            if given is not None and given != str(count(self.datamodule)):
                raise UsageError(
                    f"--model.{name} {given}: the data have {count(self.datamodule)}, and decide; "
                    f"leave it out{', and give --data.in_chans' if name == 'in_chans' else ''}"
                )

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
            for line in finish_tracking(self.trainer.loggers):
                print(line)
        except SIGTERMException as stop:  # all processes raise_if_set it after the same step
            self._say_how_to_continue()
            wait_for_rank_zero(self.trainer)
            sys.exit(stop.code or 128 + signal.SIGTERM)
        except FloatingPointError:  # on all ranks, see NonFiniteGuard
            self._say_how_to_continue()
            wait_for_rank_zero(self.trainer)
            raise
        except BaseException:
            self._say_how_to_continue()
            self._discard_what_never_began()
            raise

    @rank_zero_only
    def _discard_what_never_began(self) -> None:
        """Leave no folder of a run that was refused before its first step."""
        if self.run is None or self._began() or self.run == self.continued.run:
            return
        tracked = (self.run.path / "wandb").exists()
        new = self.config[self.subcommand].ckpt_path is None
        if new and (not tracked or end_offline_runs(self.trainer.loggers)):
            self.run.discard()

    def _began(self) -> bool:
        records = cast(Any, self.trainer).callbacks
        return any(isinstance(record, SaveRunConfig) and record.began for record in records)

    @rank_zero_only
    def before_fit(self) -> None:
        """Say what is trained, and where it goes."""
        network = getattr(self.model, "model", self.model)
        scheme = scheme_of(network)
        deployed = f"{scheme} deployed"  # which folds when its scales are known
        if scheme is None:
            # some of timm's networks fold in this mode only
            folded = reparameterize(copy.deepcopy(network).eval())
            deployed = f"{_millions(folded)} deployed"
        name = self.model.hparams.get("model", type(self.model).__name__)
        print(
            f"{name}: {_millions(network)} parameters in training, {deployed}; "
            f"{num_classes(self.datamodule)} classes, {self._input_size()} pixels"
        )
        if self.run is not None:
            print(f"run folder: {self.run.path}")

    def _input_size(self) -> str:
        return "×".join(str(n) for n in self.datamodule.data_config["input_size"])

    @rank_zero_only
    def after_fit(self) -> None:
        """Print how good the best model is, and where its files are."""
        saver = self.trainer.checkpoint_callback
        if self.run is not None and isinstance(saver, ReparameterizeOnSave):
            Console().print(fit_summary(saver, self.run.path))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """As LightningCLI does; the scores are printed below."""
        kwargs: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        return {**kwargs, "verbose": False} if "verbose" in kwargs else kwargs

    def after_validate(self) -> None:
        """Print the scores."""
        self._print_scores()

    def after_test(self) -> None:
        """Print the scores."""
        self._print_scores()

    @rank_zero_only
    def _print_scores(self) -> None:
        if self.config[self.subcommand].verbose:
            Console().print(evaluation_summary(self.trainer, str(self.subcommand)))
        pictures = Path(self.trainer.default_root_dir) / "report"
        if self.subcommand == "test" and (pictures / "confusion_matrix.csv").is_file():
            print(f"confusion matrix, as .csv and .png: {pictures}/confusion_matrix.*")

    @rank_zero_only
    def _say_how_to_continue(self) -> None:
        """Unless it was refused before it began: the same would happen again."""
        last = newest_usable(self.run.path)[0] if self.run is not None and self._began() else None
        if last is None or self.run is None:
            return
        words = ["fit", "--ckpt_path", str(last)]
        try:
            complete = not check_run_config(self.run.config)
        except ValueError:  # code of the user's own, whose configuration must be given
            complete = False
        if not complete:
            words += ["--config", str(self.run.config)]
        # a line of its own, wherever the progress bar was stopped
        print(f"\nto continue: {self.program} {shlex.join(words)}")

    def _run_folder(self) -> RunFolder:
        config = self.config[self.subcommand]
        if config.ckpt_path is not None:
            found = RunFolder.of_checkpoint(config.ckpt_path)
            if found is not None:
                return found
        if self.continued.run is not None:
            return self.continued.run
        run = RunFolder.create(config.run.root, _run_name(config))
        if self.subcommand == "fit" and run.path.is_dir():
            run.write_config(self._dump(config))  # a run that is killed early is found by it
        return run


_WRAPPED = ("Call to compute_fn", "Does not validate against any of the Union")


def _given_class(section: str, argv: list[str]) -> str | None:
    """The class of `model` or `data` that a command line or its configurations name."""
    flag = option_value(argv, f"--{section}", f"--{section}.class_path")
    named: str | None = value_in_configs(f"{section}.class_path", argv)
    # a run's configuration names the template's class where nobody has chosen one
    given = flag or (None if str(named).startswith("lightning_modules.") else named)
    return given if given and is_class(given) else None  # else parsing it says what is wrong


def _run_name(config: Namespace) -> str:
    """The name that is given, else the network's, else that of the class."""
    name: str | None = config.run.name or config.get("model.init_args.model")
    return name or config.model.class_path.rpartition(".")[2]


def _listed(plugins: Any) -> list[Any]:
    return list(plugins) if isinstance(plugins, (list, tuple)) else [plugins] if plugins else []


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"
