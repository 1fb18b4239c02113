// Whether this process may use matrix tiles, for whoever chooses a form.
#include "tiles.h"

extern "C" bool fnml_has_tiles() {
#if FNML_TILES
  return fnml::tiles::allowed();
#else
  return false;
#endif
}
