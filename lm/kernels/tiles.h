/* Tile layout of weights. */
#pragma once
#include "kernels.h"

enum {
    ROWS = 32, /* outputs side by side in a tile */
    GROUP = 32 /* inputs that share a scale */
};

static inline int64_t treeline_scales_bytes(Format format)
{
    return format.scale * ROWS * (format.scale == 2 && format.bits == 8 ? 1 : 2);
}

static inline int64_t treeline_group_bytes(Format format)
{
    return treeline_scales_bytes(format) + GROUP * ROWS * format.bits / 8;
}
