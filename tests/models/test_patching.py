"""replaced_forwards replaces a module's forward within a block, and restores it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ppo_fast.models.patching import replaced_forwards


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_modules_get_their_own_forwards_back(error):
    """A forward may be the class's, or one set on the module, as accelerate does."""
    plain, changed = nn.Identity(), nn.Identity()
    own = changed.forward = lambda x: x + 1
    hooked = []
    plain.register_forward_hook(lambda *_: hooked.append(1))
    one = torch.ones(())
    try:
        with replaced_forwards([(plain, lambda x: x + 10), (changed, lambda x: x + 20)]):
            assert (plain(one), changed(one)) == (11, 21)
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert "forward" not in vars(plain)
    assert vars(changed)["forward"] is own
    assert (plain(one), changed(one)) == (1, 2)
    assert len(hooked) == 2
