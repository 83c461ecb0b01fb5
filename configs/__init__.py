"""The YAML files that `lso fit --config NAME` finds by name; a package only so that a wheel carries them."""
