/* edgevlm image kernels, C ABI.
 *
 * A picture of uint8 RGB goes in; uint8 patches, in the order a vision tower wants, come out. The
 * resize equals Pillow's Image.resize bit for bit, on every CPU tier and with any thread count.
 * Functions may be called from any thread. Nothing throws, aborts or prints; failures are codes.
 */
#ifndef EDGEVLM_KERNELS_H
#define EDGEVLM_KERNELS_H

#include <stdbool.h>
#include <stdint.h>

#pragma GCC visibility push(default) /* all else in the library is hidden */
#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a function, a struct or a meaning below changes. */
#define EDGEVLM_ABI_VERSION 1

/* Largest side of a picture, canvas, tile or patch, largest distance of a tile from the origin, and
 * most tiles. */
#define EDGEVLM_MAX_SIDE_PX (1 << 24)

enum edgevlm_status {
  EDGEVLM_OK = 0,
  EDGEVLM_CANCELLED = 1,        /* the cancel flag was set; the output is unspecified */
  EDGEVLM_INVALID_ARGUMENT = 2, /* a null pointer, a size out of range, or sizes that disagree */
  EDGEVLM_OUT_OF_MEMORY = 3,
  EDGEVLM_UNKNOWN_TIER = 4, /* this build has no tier of that name */
  EDGEVLM_TIER_LACKING = 5  /* the build has the tier, this CPU does not */
};

/* Pillow's filters of the same names. */
enum edgevlm_filter {
  EDGEVLM_BOX = 0,
  EDGEVLM_BILINEAR = 1,
  EDGEVLM_BICUBIC = 2,
  EDGEVLM_LANCZOS = 3
};

/* A picture lying on a canvas; what it does not cover of the canvas has the fill colour. */
typedef struct edgevlm_picture {
  const uint8_t* pixels; /* RGB [height, width, 3]: pixels contiguous, rows `row_bytes` apart */
  int64_t row_bytes;     /* at least 3 * width */
  int32_t height;
  int32_t width;
  int32_t
      canvas_height; /* the canvas is what gets resized; height and width where none is wanted */
  int32_t canvas_width;
  int32_t canvas_top; /* corner of the picture on the canvas; the picture lies inside wholly */
  int32_t canvas_left;
} edgevlm_picture;

/* How the canvas is resized and cut. A plain resize is one tile of one patch, channels last. */
typedef struct edgevlm_tiling {
  int32_t height; /* size of the resized canvas, px */
  int32_t width;
  int32_t filter;       /* enum edgevlm_filter */
  int32_t n_tiles;      /* at least 1 */
  const int32_t* tiles; /* [n_tiles, 2]: top and left of each tile in the resized canvas, px; a
                           tile may reach outside, or lie outside, and gets the fill colour there */
  int32_t tile_height;
  int32_t tile_width;
  int32_t patch_height;   /* divides tile_height */
  int32_t patch_width;    /* divides tile_width */
  int32_t channels_first; /* inside a patch: [3, height, width] if not 0, else [height, width, 3] */
  uint8_t fill[3];        /* RGB */
} edgevlm_tiling;

int32_t edgevlm_abi_version(void);

/* Name of the index-th tier that this CPU can run, best first; NULL past the last. */
const char* edgevlm_tier_name(int32_t index);

/* Name of the tier in force: the best one until edgevlm_select_tier() chose another. */
const char* edgevlm_tier(void);

/* Puts a tier in force for the calls that follow. Never falls back: EDGEVLM_UNKNOWN_TIER or
 * EDGEVLM_TIER_LACKING leave the tier as it was. */
int32_t edgevlm_select_tier(const char* name);

/* Resizes a picture and cuts it into patches.
 *
 * out     uint8 [n_tiles, n_patches, patch_height * patch_width * 3], patches row by row
 * out_bytes  its size; must be exactly that
 * threads at least 1; the calling thread is one of them
 * cancel  NULL, or a flag looked at before every row: not 0 stops all threads
 *
 * EDGEVLM_OK, EDGEVLM_CANCELLED, EDGEVLM_INVALID_ARGUMENT or EDGEVLM_OUT_OF_MEMORY. */
int32_t edgevlm_resize(const edgevlm_picture* picture, const edgevlm_tiling* tiling, uint8_t* out,
                       int64_t out_bytes, int32_t threads, const volatile int32_t* cancel);

/* Whether the int32 behind `flag` is not 0. Has the type of llama.cpp's abort callback, so that
 * cancelling it takes no Python and no GIL. */
bool edgevlm_flag_is_set(void* flag);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop

#endif
