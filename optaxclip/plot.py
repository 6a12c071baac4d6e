"""What does a run look like, and where would a threshold lie?"""

from optaxclip._plots.layers import layers as layers
from optaxclip._plots.run import run as run
from optaxclip._plots.sweep import sweep as sweep
from optaxclip._plots.thresholds import thresholds as thresholds
