# The miniature, from drawn faces to weights: hours on two cores, minutes on a GPU.
#
#   make miniature                                  everything; after a kill the same command goes on where it was
#   make -j2 miniature THREADS=1                    two trainings at a time, one thread each: the best use of two cores
#   make miniature RUNS=elsewhere FIT="--trainer.devices 4 --config overlay/ddp"
#
# A stage is `lso fit` with the shipped config train/miniature_STAGE; its folder in RUNS has checkpoints and an export.
RUNS ?= runs/miniature
FIT ?=
THREADS ?=
DRAW = $(BIN)/lso pack --size 64 --synthetic
TRAIN = $(if $(THREADS),OMP_NUM_THREADS=$(THREADS)) $(BIN)/lso fit --config train/miniature_$* $(FIT) --ckpt_path last \
	--trainer.default_root_dir $(RUNS)/$* --data.shards
STAGES := vae vae_details vae_decoder vae_mouth clip unet unet_details unet_words objective guard judge constraint measured

.PHONY: miniature
miniature: $(STAGES:%=$(RUNS)/%/done)
	$(BIN)/python benchmarks/assemble_miniature.py --runs $(RUNS)
	$(BIN)/python benchmarks/miniature.py

# data: a folder appears when it is complete
$(RUNS)/faces64/manifest.json: | $(STAMP)
	$(DRAW) 60000 $(@D) --val 0.02
$(RUNS)/faces64_guard/manifest.json: | $(STAMP)
	$(DRAW) 40000 $(@D) --seed 101
$(RUNS)/faces64_judge/manifest.json: | $(STAMP)
	$(DRAW) 40000 $(@D) --seed 202 --supersample 2 --spread 1.3
$(RUNS)/people64/manifest.json: | $(STAMP)
	$(DRAW) 40000 $(@D) --seed 301 --pictures_per_person 8
$(RUNS)/people64_measured/manifest.json: | $(STAMP)
	$(DRAW) 40000 $(@D) --seed 302 --pictures_per_person 8

# trainings; a run folder appears when its fit begins, so `done` says whether it ended
SHARDS_guard := faces64_guard
SHARDS_judge := faces64_judge
SHARDS_constraint := people64
SHARDS_measured := people64_measured
OPTIONS_vae_details = --model.folder $(RUNS)/vae/export
GUARD = --model.perceptual.init_args.features.init_args.folder $(RUNS)/guard/export
OPTIONS_vae_decoder = --model.folder $(RUNS)/vae_details/export $(GUARD)
OPTIONS_vae_mouth = --model.folder $(RUNS)/vae_decoder/export $(GUARD)
LATENTS = --model.autoencoder $(RUNS)/vae_details/export --model.cache $(RUNS)/latents
OPTIONS_unet = $(LATENTS) --model.text $(RUNS)/clip/export
OPTIONS_unet_details = $(LATENTS) --model.folder $(RUNS)/unet/export
OPTIONS_unet_words = $(LATENTS) --model.folder $(RUNS)/unet_details/export
.SECONDEXPANSION:
$(STAGES:%=$(RUNS)/%/done): $(RUNS)/%/done: $(RUNS)/$$(or $$(SHARDS_$$*),faces64)/manifest.json
	$(TRAIN) $(<D) $(OPTIONS_$*)
	touch $@

$(RUNS)/vae_details/done: $(RUNS)/vae/done
# the decoder goes on learning while the U-Net learns the latents, which stay
$(RUNS)/vae_decoder/done: $(RUNS)/vae_details/done $(RUNS)/guard/done
$(RUNS)/vae_mouth/done: $(RUNS)/vae_decoder/done
$(RUNS)/unet/done: $(RUNS)/vae_details/done $(RUNS)/clip/done
$(RUNS)/unet_details/done: $(RUNS)/unet/done
$(RUNS)/unet_words/done: $(RUNS)/unet_details/done
