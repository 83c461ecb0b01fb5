"""The space of a LatentVQVAE: always on the codebook, with a gradient, in a search from the shipped config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lso_lightning import cli
from lso_lightning.__main__ import main
from lso_lightning.errors import UserError
from lso_lightning.generators import Autoencoder
from lso_lightning.images import eight_bit
from lso_lightning.networks.latent_vqvae import LatentVQVAENetwork, save_latent_vqvae
from lso_lightning.spaces import GaussianDensity, LatentVQVAESpace
from tests.factories import pictures, tiny_autoencoder
from tests.fits import QUIET
from tests.models.vqvae_toys import ONE, TWO
from tests.optimization import searches

ROWS = torch.arange(3)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Autoencoder:
    return Autoencoder(str(tiny_autoencoder(tmp_path_factory.mktemp("vae") / "vae", "AutoencoderKL")))


def export(folder: Path, generator: Autoencoder, architecture: dict[str, Any] = TWO, codes: int = 64) -> str:
    """A network whose codebooks are encodings, untrained otherwise."""
    torch.manual_seed(0)
    grids = [{**grid, "codes": codes} for grid in architecture["grids"]]
    network = LatentVQVAENetwork(**{**architecture, "grids": grids})
    with torch.no_grad():
        network(generator.encode(pictures(8, 4 * architecture["shape"][1], seed=9)))  # in train mode: codes begin
    save_latent_vqvae(network, folder)
    return str(folder)


def space_of(generator: Autoencoder, folder: Path, architecture: dict[str, Any] = TWO, **more: Any) -> LatentVQVAESpace:
    space = LatentVQVAESpace(generator, export(folder, generator, architecture), **more)
    space.configure(32)
    return space


@pytest.mark.parametrize("architecture", [ONE, TWO, {**TWO, "kind": "vae"}])
def test_shapes_and_the_codebook(generator: Autoencoder, tmp_path: Path, architecture: dict[str, Any]) -> None:
    space, x = space_of(generator, tmp_path, architecture), pictures(3, 32)
    z = space.encode(x)
    assert z.shape == (3, space.dim) and z.dtype == torch.float32
    images, snapped = space.decode(z, {}), space.project(z)
    assert images.shape == x.shape and torch.equal(images, eight_bit(images))
    assert torch.equal(space.decode(snapped, {}), images) and torch.equal(space.project(snapped), snapped)
    assert torch.equal(z, snapped) == (architecture.get("kind") == "vae")
    assert torch.equal(space.decode(z[1:2], {}), space.decode(z, {})[1:2])


def test_gradients_reach_every_number_of_their_own_row(generator: Autoencoder, tmp_path: Path) -> None:
    space, x = space_of(generator, tmp_path), pictures(3, 32)
    z = space.encode(x).requires_grad_()
    space.decode(z, {})[1].sum().backward()
    assert z.grad is not None and z.grad[1].ne(0).float().mean() > 0.9 and not z.grad[[0, 2]].any()
    assert all(weight.grad is None for weight in space.parameters())


@pytest.mark.parametrize("fade", [None, 0.05])
def test_keep_detail_starts_from_the_very_picture(generator: Autoencoder, tmp_path: Path, fade: float | None) -> None:
    space, x = space_of(generator, tmp_path, keep_detail=True, fade=fade), eight_bit(pictures(3, 32))
    context = space.context(x, ROWS, 0)
    assert torch.equal(space.decode(space.encode(x), context), x)
    assert not torch.equal(space_of(generator, tmp_path).decode(space.encode(x), {}), x)


def test_a_search_in_train_mode_does_not_teach_the_codebook(generator: Autoencoder, tmp_path: Path) -> None:
    space = space_of(generator, tmp_path).train()
    before = space.weights_id()
    space.decode(space.encode(pictures(3, 32)), {})
    assert space.weights_id() == before and not any(one._seen for one in space.network.quantizers)


def test_the_id_names_both_networks(generator: Autoencoder, tmp_path: Path) -> None:
    space = space_of(generator, tmp_path / "one")
    assert space.weights_id() == space_of(generator, tmp_path / "one").weights_id()
    other = Autoencoder(str(tiny_autoencoder(tmp_path / "vae", "AutoencoderKL", seed=1)))
    assert LatentVQVAESpace(other, str(tmp_path / "one")).weights_id() != space.weights_id()
    assert space_of(generator, tmp_path / "two", ONE).weights_id() != space.weights_id()


def test_neighbours_are_of_one_grid(generator: Autoencoder, tmp_path: Path) -> None:
    space = space_of(generator, tmp_path)
    fine, coarse = space.network.sizes
    found = space.neighbourhood(torch.cat([torch.ones(fine), torch.arange(coarse).float()]))
    torch.testing.assert_close(found[:fine], torch.ones(fine))
    grid = found[fine:].view(4, 4, 4)
    assert torch.equal(grid[0], grid[3]) and grid[0, 0, 0] < grid[0, 3, 3]


def test_a_density_pulls_first_and_the_codebook_has_the_last_word(generator: Autoencoder, tmp_path: Path) -> None:
    density = GaussianDensity(str(tmp_path), rank=4)
    space = space_of(generator, tmp_path / "folder", density=density)
    density.fit(space.encode(pictures(40, 32)))
    z = space.encode(pictures(3, 32, seed=1)) * 10
    assert torch.equal(space.project(z), space.network.project(density.project(z)))
    assert space.log_prior(z).shape == (3,)


def test_another_size_is_refused(generator: Autoencoder, tmp_path: Path) -> None:
    space = space_of(generator, tmp_path)
    with pytest.raises(UserError, match=r"images of 16 pixels have \[4, 4, 4\]; give --data\.size 32"):
        space.configure(16)
    with pytest.raises(UserError, match=r"LatentVQVAE .*expected the export of a LatentVQVAE training"):
        LatentVQVAESpace(generator, str(tmp_path / "nowhere"))


def test_the_shipped_search_config_raises_a_score(run: Path, tmp_path: Path, generator: Autoencoder) -> None:
    folder = export(tmp_path / "vqvae", generator, ONE, 64)
    source = searches.pictures(tmp_path / "pictures", 3, 32)
    main([
        "fit", "--config=optimize/latent_vqvae_gradient", f"--data.source={source}", "--data.size=32",
        f"--model.space.init_args.generator.init_args.folder={generator.path}",
        f"--model.space.init_args.vqvae={folder}", "--model.objective=tests.factories.Brightness",
        "--model.faithfulness=tests.factories.Closeness", "--model.views.init_args.count=1",
        f"--trainer.default_root_dir={run}", "--trainer.max_epochs=8", *QUIET,
    ])  # fmt: skip
    records = searches.records(run)
    first, last = records[0]["score"], records[-1]["score"]
    assert sum(last) > sum(first) + 0.1
    table = searches.checkpoint(run)["state_dict"]
    assert table["table.z"].shape == (3, 64)


def test_the_overlays_of_the_miniature_fit_the_search_config(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    monkeypatch.setattr(cli.RunCLI, "_run_subcommand", lambda self, _: built.append(self))
    monkeypatch.chdir(tmp_path)
    grids = [{"scale": 0, "dim": 4, "codes": 16}]
    save_latent_vqvae(
        LatentVQVAENetwork([16, 8, 8], "vq", [8], 1, grids), tmp_path / "runs" / "miniature_latent_vqvae" / "export"
    )
    main(["fit", "--config=optimize/latent_vqvae_gradient", "--config=overlay/miniature",
          "--config=overlay/miniature_latent_vqvae", "--data.source=faces",
          f"--trainer.default_root_dir={run}"])  # fmt: skip
    space = built[0].model.space
    space.configure(built[0].datamodule.size)
    assert isinstance(space, LatentVQVAESpace) and space.dim == 256 and space.generator.latent_shape(64) == (16, 8, 8)
