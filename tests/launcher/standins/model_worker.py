from fastserve.config import WorkerConfig

from .service import run

run("model_worker", WorkerConfig)
