// patch_kernels._host: the layout functions of layout.h for tests and tools, without torch.
#include <pybind11/pybind11.h>

#include "../layout.h"

namespace pk = patch_kernels;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Packed format v1, byte by byte: the functions of csrc/layout.h.";
  m.attr("TILE") = pk::kTile;
  m.attr("DENSE_TILE_BYTES") = pk::kDenseTileBytes;
  m.attr("SPARSE_TILE_BYTES") = pk::kSparseTileBytes;
  m.attr("SLOT_BYTES") = pk::kSlotBytes;
  m.def("dense_offset", [](int r, int k) { return pk::dense_offset(r, k); });
  m.def("value_offset", [](int r, int p) { return pk::value_offset(r, p); });
  m.def("meta_word", [](int r, int c) { return pk::meta_word(r, c); });
  m.def("meta_shift", [](int r, int c) { return pk::meta_shift(r, c); });
  m.def("group_nibble", [](int bits) { return pk::group_nibble(bits); });
  m.def("is_legal_nibble", [](int nibble) { return pk::is_legal_nibble(nibble); });
}
