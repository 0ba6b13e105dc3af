"""What a forward sets for its own later layers, kept by thread: it ends with the forward.

Several threads run the same modules at once (steps, and the compiler that traces them), so no forward writes to a
module or to anything else that threads share. The compiler follows a thread's own attributes as it follows names.
Knows no models.

Keyword arguments would do the same and were rejected: some models (StableLM) do not hand them down to their
attention. A test runs every architecture and looks at all that its modules hold.
"""

from __future__ import annotations

import threading
from typing import Any


class ForwardLocal(threading.local):
    """All None outside of a forward."""

    paged: Any = None  # what attention reads, see `compiler.model.paged`
    recurrence: Any = None  # what computes the layer with state that it is in, see `compiler.model.recurrent`
    rows: Any = None  # int64 [S], of tokens whose logits are wanted
    hidden: Any = None  # what the body returned, for whoever wants more than the logits
    products: dict[Any, Any] | None = None  # of merged linears, of which parts are not yet asked for


forward_local = ForwardLocal()
