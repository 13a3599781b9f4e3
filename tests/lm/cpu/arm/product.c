/* Multiplies by a layer given on standard input, for processors that Python does not run on here.
   In: bits, scale bytes, features in, features out, tokens, kernel, bytes of the tiles, as int64; tiles; inputs.
   Out: the outputs; nothing if the kernel does not run here. */
#include <stdio.h>
#include <stdlib.h>

#include "kernels.h"

void treeline_linear(const Linear *linear, const float *inputs, float *outputs, int64_t tokens, int64_t threads);

static void *taken(size_t bytes)
{
    void *data = malloc(bytes);
    if (fread(data, 1, bytes, stdin) != bytes)
        exit(1);
    return data;
}

int main(void)
{
    int64_t *head = taken(7 * sizeof *head);
    Linear linear = {taken(head[6]), NULL, {head[0], head[1]}, head[2], head[3], head[5]};
    int64_t tokens = head[4], size = tokens * linear.features_out;
    float *inputs = taken(tokens * linear.features_in * sizeof(float)), *outputs = malloc(size * sizeof(float));
    if (!treeline_runs(linear.kernel))
        return 0;
    treeline_linear(&linear, inputs, outputs, tokens, 2);
    return fwrite(outputs, sizeof(float), size, stdout) != (size_t)size;
}
