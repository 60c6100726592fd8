"""The pack's own socket types. What travels on each is a value of the pipeline, never a module."""

from .host import io

Model = io.Custom("DUET_MODEL")  # pipeline.checkpoints.Checkpoint
PromptEmbeds = io.Custom("DUET_PROMPT_EMBEDS")  # pipeline.conditioning.PromptEmbeds
ImageFeatures = io.Custom("DUET_IMAGE_FEATURES")  # pipeline.conditioning.ImageFeatures
Conditioning = io.Custom("DUET_CONDITIONING")  # pipeline.conditioning.FusedConditioning
SpeedPlan = io.Custom("DUET_SPEED_PLAN")  # pipeline.speed_plan.SpeedPlan
Report = io.Custom("DUET_REPORT")  # pipeline.conditioning.GenerationReport
