"""The verifier service: engine, gRPC port, profile, plan and reports, put together."""

from __future__ import annotations

import asyncio
import logging
import uuid

from prometheus_client import CollectorRegistry

from lm.model import LanguageModel
from lm.store import vocabulary_sha256
from planner.client import PlanWatcher, StepReporter
from treeline.config import Config
from treeline.metrics import VerifierMetrics, serve_metrics
from treeline.plan import StepRecord, VerifierProfile
from treeline.rpc import Discover, bind, new_server
from verifier_svc.async_engine import AsyncEngine
from verifier_svc.engine import Engine
from verifier_svc.link import GrpcLink, wait_for_info
from verifier_svc.profile import profile_verification

logger = logging.getLogger(__name__)

DRAFTER_WAIT_S = 5.0
