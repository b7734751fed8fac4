// From the checked sizes of bind/rows.h to what the CUDA kernels of cuda/rows.cuh take.
#pragma once

#include "bind/rows.h"
#include "cuda/rows.cuh"

namespace perturbed {

inline RowArgs move_rows(const MoveSizes& s) {
  RowArgs rows = {};
  rows.directions = s.directions;
  rows.tokens = s.tokens;
  rows.repeats = rows.sources = s.rows / s.directions;
  rows.source_stride = s.shared ? s.x_row_stride : s.directions * s.x_row_stride;
  rows.direction_stride = s.shared ? 0 : s.x_row_stride;
  rows.token_stride = s.x_token_stride;
  rows.antithetic = s.antithetic;
  return rows;
}

inline RowArgs add_rows(const AddSizes& s) {
  RowArgs rows = {};
  rows.directions = s.directions;
  rows.tokens = s.tokens;
  rows.repeats = s.rows / s.directions;
  rows.sources = s.sources / s.directions;
  rows.source_stride = s.directions * s.z_row_stride;
  rows.direction_stride = s.z_row_stride;
  rows.token_stride = s.z_token_stride;
  rows.antithetic = s.antithetic;
  return rows;
}

}  // namespace perturbed
