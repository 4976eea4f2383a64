import numpy as np
from grids import COLUMNS, DRAWN, join_tiles, tiles


def test_tiles_are_found_again_in_a_grid():
    rows = np.random.default_rng(0).integers(0, 256, (len(DRAWN), COLUMNS, 64, 64, 3), dtype=np.uint8)
    grid = join_tiles(list(rows))
    assert all(np.array_equal(tiles(grid, name), row) for name, row in zip(DRAWN, rows))
