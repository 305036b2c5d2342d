"""Small generated pictures with everything known about them; sample i of seed s is the same on any worker."""

from lynceus.data.synth.depth import depth_planes as depth_planes
from lynceus.data.synth.digits_on_photos import digits_on_photos as digits_on_photos
from lynceus.data.synth.objects import objects as objects
from lynceus.data.synth.scenes import shapes as shapes
from lynceus.data.synth.scenes import sprites as sprites
from lynceus.data.synth.video import moving_shapes as moving_shapes

__all__ = ["depth_planes", "digits_on_photos", "moving_shapes", "objects", "shapes", "sprites"]
