// Runs the kernels without Python, for CPUs that are emulated.
//
//   replay tiers          prints the tiers that run here, best first
//   replay select TIER    exits with the code of edgevlm_select_tier()
//   replay run FILE TIER  does the cases of FILE; prints those that differ and exits with 1
//
// FILE, int32 little endian unless told otherwise: number of cases; then of each case picture
// height and width, canvas height, width, top and left, the numbers of edgevlm_tiling from `height`
// to `n_tiles`, then from `tile_height` to `channels_first`, fill as three, the tiles, output
// bytes; uint8 pixels; uint8 expected output.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "../../kernels/edgevlm_kernels.h"

namespace {

class Reader {
 public:
  explicit Reader(const char* path) : file_(path, std::ios::binary) {}

  int32_t number() {
    int32_t value = 0;
    file_.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
  }

  std::vector<uint8_t> bytes(int64_t n) {
    std::vector<uint8_t> values(static_cast<size_t>(n));
    file_.read(reinterpret_cast<char*>(values.data()), n);
    if (!file_) {
      std::fputs("the file of cases is cut short\n", stderr);
      std::exit(2);
    }
    return values;
  }

 private:
  std::ifstream file_;
};

// Whether one case, with 1 and with 3 threads, gives what is expected.
bool replay(Reader& reader) {
  edgevlm_picture picture{};
  for (int32_t* field : {&picture.height, &picture.width, &picture.canvas_height,
                         &picture.canvas_width, &picture.canvas_top, &picture.canvas_left}) {
    *field = reader.number();
  }
  edgevlm_tiling tiling{};
  for (int32_t* field :
       {&tiling.height, &tiling.width, &tiling.filter, &tiling.n_tiles, &tiling.tile_height,
        &tiling.tile_width, &tiling.patch_height, &tiling.patch_width, &tiling.channels_first}) {
    *field = reader.number();
  }
  for (uint8_t& value : tiling.fill) value = static_cast<uint8_t>(reader.number());
  std::vector<int32_t> tiles(2 * static_cast<size_t>(tiling.n_tiles));
  for (int32_t& px : tiles) px = reader.number();
  const int32_t out_bytes = reader.number();
  const std::vector<uint8_t> pixels = reader.bytes(3 * int64_t{picture.height} * picture.width);
  const std::vector<uint8_t> expected = reader.bytes(out_bytes);

  picture.pixels = pixels.data();
  picture.row_bytes = 3 * int64_t{picture.width};
  tiling.tiles = tiles.data();
  for (int32_t threads : {1, 3}) {
    std::vector<uint8_t> out(expected.size());
    const int32_t status =
        edgevlm_resize(&picture, &tiling, out.data(), out_bytes, threads, nullptr);
    if (status != EDGEVLM_OK || out != expected) return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string verb = argc > 1 ? argv[1] : "";
  if (verb == "tiers") {
    for (int32_t i = 0; edgevlm_tier_name(i) != nullptr; ++i) std::puts(edgevlm_tier_name(i));
    return 0;
  }
  if (verb == "select" && argc == 3) return edgevlm_select_tier(argv[2]);
  if (verb != "run" || argc != 4 || edgevlm_select_tier(argv[3]) != EDGEVLM_OK) return 2;

  Reader reader(argv[2]);
  const int32_t n_cases = reader.number();
  int32_t n_wrong = 0;
  for (int32_t i = 0; i < n_cases; ++i) {
    if (replay(reader)) continue;
    std::printf("case %d differs\n", i);
    ++n_wrong;
  }
  std::printf("%d of %d cases equal on %s\n", n_cases - n_wrong, n_cases, edgevlm_tier());
  return n_wrong == 0 && n_cases > 0 ? 0 : 1;
}
