"""The table of subcommands: a new one is a function and a row here."""

from dataclasses import dataclass

__all__ = ["COMMANDS", "Command"]


@dataclass(frozen=True)
class Command:
    """A row of the table. A function is named as `pkgutil.resolve_name` takes it.

    Attributes:
        help: One line for the help.
        function: What runs. Its signature and docstring make the parser, see `run_command`; without
            `show` it parses its arguments itself: it takes the last word of the name, and a list.
        show: What makes, of the function's result, a text or a table to print.
        example: Arguments, for the help.
        figure: What draws a `Result`, if that has a chart.
        first: Option that may hold the first positional argument instead.
    """

    help: str
    function: str
    show: str = ""
    example: str = ""
    figure: str = ""
    first: str = ""


_FIT = "lightning_modules.run.fit:run"
_DENSE = "lightning_modules.cli.dense_commands:run"
_EXPORT = "lightning_modules.dense.export:export_"
_OUTPUT = "lightning_modules.cli.output:"
_SHARDS = "lightning_modules.data.shards"
_INFERENCE = "mobileone.bench.inference"
_TABLE = "mobileone.bench.show.tables:result_table"
_BARS = "mobileone.bench.show.charts:bar_figure"
_STUDIES = "mobileone.bench.studies"
_BEST = "runs/quickstart/latest/checkpoints/best"

COMMANDS = {
    "fit": Command("train; after each validation write checkpoint and fused artifacts", _FIT),
    "validate": Command("evaluate a checkpoint on the validation set", _FIT),
    "test": Command("evaluate a checkpoint on the test set, with a confusion matrix", _FIT),
    "predict": Command(
        "label a folder of images with a checkpoint or an artifact, into a CSV file",
        "lightning_modules.inference.predict:predict_folder",
        f"{_OUTPUT}show_predictions",
        f"{_BEST} photos/ out.csv",
        first="--artifact",
    ),
    "export": Command(
        "turn a checkpoint into fused artifacts, untrained",
        "mobileone.export.checkpoint:export_checkpoint",
        f"{_OUTPUT}show_formats",
        f"{_BEST}.ckpt shipped/",
    ),
    "inspect": Command(
        "print what an artifact holds, and check its files",
        "mobileone.export.inspect:describe_artifact",
        "builtins:str",
        _BEST,
    ),
    "compress": Command(
        "write smaller files, and measure what they lose",
        "lightning_modules.inference.compress:compress_checkpoint",
        "lightning_modules.inference.compress:format_rows",
        f"{_BEST}.ckpt /path/to/images compressed/",
    ),
    "profile": Command(
        "count parameters, multiply-adds and memory traffic, next to the paper's",
        f"{_INFERENCE}.profile:profile_models",
        _TABLE,
        "mobileone_s1 repvit_m1_0 --level stage",
    ),
    "benchmark latency": Command(
        "time fused networks in every runtime that is present",
        f"{_INFERENCE}.latency:measure_latency",
        _TABLE,
        "--suite 2026 --runtimes [onnxruntime]",
    ),
    "benchmark latency --artifact": Command(
        "time the files that ship, in every runtime that reads them",
        f"{_INFERENCE}.artifact:measure_artifacts",
        _TABLE,
        f"{_BEST} --output results",
        _BARS,
    ),
    "benchmark throughput": Command(
        "count images a second of fused networks, by batch size",
        f"{_INFERENCE}.latency:measure_throughput",
        _TABLE,
        "mobileone_s1 --batch_sizes [1,16,64]",
    ),
    "benchmark memory": Command(
        "measure the peak memory of inference, each network in a process of its own",
        f"{_INFERENCE}.memory:measure_memory",
        _TABLE,
        "mobileone_s0 mobileone_s1",
    ),
    "benchmark training": Command(
        "measure a training step against timm's block and the plain network",
        "mobileone.bench.training_step.measure:measure_training",
        _TABLE,
        "mobileone_s0 --output results",
        _BARS,
    ),
    "benchmark training --suite": Command(
        "measure training steps by model, batch, precision and layout",
        "mobileone.bench.training_step.suite:measure_suite",
        _TABLE,
        "gpu --device cuda --output results",
    ),
    "benchmark data": Command(
        "count images a second by number of workers; report what limits a run",
        "lightning_modules.data.benchmark:benchmark_data",
        _TABLE,
        "--root /data/imagenet --num_workers 0,2,8 --model mobileone_s0",
    ),
    "benchmark pareto": Command(
        "draw accuracy against latency: the paper's Figure 1, with measurements of this machine",
        f"{_STUDIES}.pareto:draw_pareto",
        f"{_OUTPUT}show_paths",
        "--results [results/latency.json] --output results",
    ),
    "study bottlenecks": Command(
        "time activations, skips and SE in 30 layers (Tables 2 and 3)",
        f"{_STUDIES}.bottlenecks:study_bottlenecks",
        _TABLE,
        "--output results",
        _BARS,
    ),
    "study correlation": Command(
        "correlate latency with multiply-adds and parameters (Table 1)",
        f"{_STUDIES}.correlation:study_correlation",
        _TABLE,
        "--suite paper --output results",
        f"{_STUDIES}.correlation:correlation_figure",
    ),
    "study ablation": Command(
        "compare short trainings over k, branches and recipe (Tables 5, 6 and 8)",
        "lightning_modules.studies.ablation:study_ablation",
        _TABLE,
        "--output results/ablation",
        _BARS,
    ),
    "study quantization": Command(
        "compare integer networks, trained and not, in every integer runtime",
        "lightning_modules.studies.quantization:study_quantization",
        _TABLE,
        "--weights [runs/quickstart/latest/checkpoints/best.ckpt] --output results/quantization",
        _BARS,
    ),
    "report": Command(
        "gather results and a run into one HTML page to send",
        "lightning_modules.report.page:write_report",
        f"{_OUTPUT}show_page",
        "results --run runs/quickstart/latest",
    ),
    "shards": Command(
        "write a folder of images as WebDataset shards",
        f"{_SHARDS}.writer:make_shards",
        f"{_OUTPUT}show_shards",
        "/data/imagenet /data/imagenet-shards",
    ),
    "segment": Command("fit or validate a segmentation network", _DENSE),
    "segment export": Command(
        "write the fused network of a segmentation checkpoint",
        f"{_EXPORT}segmenter",
        f"{_OUTPUT}show_formats",
        "runs/segment/latest/checkpoints/best.ckpt shipped/",
    ),
    "detect": Command("fit or validate an object detector", _DENSE),
    "detect export": Command(
        "write the fused network of a detection checkpoint",
        f"{_EXPORT}detector",
        f"{_OUTPUT}show_formats",
        "runs/detect/latest/checkpoints/best.ckpt shipped/",
    ),
}
