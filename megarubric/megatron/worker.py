"""The trainer process: ``python -m megarubric.megatron.worker --config FILE.json --endpoint ipc://...``, one a rank.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT come from the launcher. Exit status: 0 after Shutdown, 2 for
bad input (one line on standard error), 3 when this rank or another failed. Importing Megatron takes seconds, so it is
done after this process has asked to die with its parent.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from megarubric.errors import BadInput, MegarubricError
from megarubric.launch.process import die_with_parent, set_title
from megarubric.megatron.messages import Request, WorkerConfig


def read_config(path: Path) -> WorkerConfig:
    """Parse the worker's JSON. Raises BadInput for an unreadable file, an unknown key or a wrong type."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=WorkerConfig)
    except OSError as error:
        raise BadInput(path, None, error.strerror or str(error)) from None
    except msgspec.DecodeError as error:
        raise BadInput(path, None, str(error)) from None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="megarubric.megatron.worker", description="one rank of the trainer")
    parser.add_argument("--config", type=Path, required=True, help="WorkerConfig as JSON")
    parser.add_argument("--endpoint", required=True, help="where rank 0 answers the controller")
    parser.add_argument("--keys", type=Path, help="CURVE key pair of the run, for tcp:// and several hosts")
    args = parser.parse_args(argv)
    die_with_parent()
    set_title(f"megarubric trainer rank {os.environ.get('RANK', '0')}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that segments are removed on the way out
    try:
        config = read_config(args.config)
        _work(config, args.endpoint, args.keys)
    except MegarubricError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(error, file=sys.stderr, flush=True)
        return error.exit_status
    return 0


def _work(config: WorkerConfig, endpoint: str, keys: Path | None) -> None:
    """Build this rank and execute commands until told to shut down."""
    from megarubric.exchange.rpc import CurveKeys, Server
    from megarubric.megatron import service
    from megarubric.megatron.trainer import Trainer

    trainer: Trainer | None = None
    server: Server[Any] | None = None
    try:
        pair = CurveKeys.load(keys) if keys else None
        trainer = Trainer(config, pair)
        if trainer.rank == 0:
            server = Server(endpoint, Request, pair)
            service.serve(trainer, server)
        else:
            service.follow(trainer)
    except MegarubricError:
        raise
    except Exception as error:
        raise service.as_process_died(error) from error
    finally:
        if server is not None:
            server.close()
        if trainer is not None:
            trainer.sender.close()
    trainer.close()


def run() -> None:
    """`main`, then out at once: process groups whose peers are gone would wait for them while Python ends."""
    status = 1
    try:
        status = main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
