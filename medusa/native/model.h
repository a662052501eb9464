/* What Python hands over for a step: the model, and the new rows. */

#pragma once

#include "products.h"

typedef struct {
    const float *norm_attention, *norm_mlp;
    const float *bias, *gains; /* NULL where there is none: [(G + 2) H E] of queries, keys, values; [2][E] of head norms */
    Weight query_key_value, out, gate, up, down;
} Layer;

typedef struct {
    const Layer *layers;
    int64_t num_layers, hidden, num_kv_heads, groups, head_dim;
    int64_t window; /* positions that a query sees, its own the last; 0: all before it */
    float eps;
    const float *norm, *cos, *sin; /* cos and sin [positions][E / 2] */
} Model;

typedef struct {
    int64_t batch, num_new;
    const int64_t *offsets, *positions; /* [batch], [batch][num_new] */
    const uint8_t *visible;             /* [num_new][num_new] of the first sequence: may that row see that column? */
    int64_t visible_stride;             /* to the next sequence's; 0 where all share one */
    uint16_t *cache; /* bfloat16: keys of the first layer, first row's slot; values lie one plane behind */
    int64_t plane_stride, slot_stride, head_stride;
    float *hidden; /* [M][D], embeddings in, last hidden states out */
    char *work;    /* medusa_work_bytes of it */
    int64_t threads;
} Step;
