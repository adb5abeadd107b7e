"""Scripts that set this checkout up, show it and test it. No part of the installed product."""
