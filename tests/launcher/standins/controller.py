from fastserve.config import ControllerConfig

from .service import run

run("controller", ControllerConfig)
