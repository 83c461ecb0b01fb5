"""LightningModules that train."""

from lso_lightning.models.attribute_classifier import AttributeClassifier
from lso_lightning.models.autoencoder_folder import build_autoencoder, export_autoencoder
from lso_lightning.models.contrastive import Contrastive
from lso_lightning.models.encoder_features import ClassifierFeatures, EncoderFeatures
from lso_lightning.models.identity import Identity
from lso_lightning.models.latent_diffusion import LatentDiffusion
from lso_lightning.models.latent_vqvae import LatentVQVAE
from lso_lightning.models.lora_adapter import LoRAdapter
from lso_lightning.models.vae_finetune import VAEFinetune

__all__ = [
    "AttributeClassifier",
    "ClassifierFeatures",
    "Contrastive",
    "EncoderFeatures",
    "Identity",
    "LatentDiffusion",
    "LatentVQVAE",
    "LoRAdapter",
    "VAEFinetune",
    "build_autoencoder",
    "export_autoencoder",
]
