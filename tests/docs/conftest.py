"""One tiny run that the tests of the documents look at."""

import pytest

from lightning_modules.cli.main import main


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The run folder of two epochs of eight digits each, with snapshots and a test."""
    root = tmp_path_factory.mktemp("docs")
    words = (
        "--config quickstart.yaml --model.model mobileone_mu0 --model.lr 0.001 "
        "--model.warmup_epochs 0 --data.input_size 32 --data.batch_size 4 --data.num_workers 0 "
        "--trainer.max_epochs 2 --trainer.check_val_every_n_epoch 1 --trainer.limit_val_batches 2 "
        "--trainer.limit_train_batches 2 --snapshots.every_n_steps 1 --wandb.mode disabled "
        "--checkpoint.formats [torchscript,coreml_fp32,onnx] --checkpoint.background false "
        "--trainer.enable_progress_bar false --trainer.accelerator cpu"
    )
    run = root / "quickstart" / "latest"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        main(["fit", *words.split(), "--run.root", str(root)])
        last = str(run / "checkpoints/last.ckpt")
        main(["test", "--ckpt_path", last, "--wandb.mode", "disabled"])
    return run
