// The packed rubric table: one int32 tensor that holds any number of rubrics. megarubric/reward/table.py writes it.
//
//   TableHeader | RubricRecord[n_rubrics] | CriterionRecord[...] | PairRecord[...]      (all records 16-byte aligned)
//
// Floats are stored by their bits. Products that do not depend on a sample (weight * ceiling) are made when packing.
#pragma once

#include <cstdint>

namespace megarubric {

constexpr int32_t kTableMagic = 0x4d525432;  // "MRT2"

struct alignas(16) TableHeader {
  int32_t magic;
  int32_t n_rubrics;
  int32_t max_criteria;
  int32_t max_pairs;
  int32_t words;  // of the whole table
  int32_t reserved[3];
};

enum RubricFlags : int32_t {
  kShaped = 1,
  kHasPitfall = 2,          // some weight is negative
  kMissingVetoFails = 4,    // on_missing_veto: fail
  kMissingVetoUnscores = 8  // on_missing_veto: unscored (neither bit: pass)
};

struct alignas(16) RubricRecord {
  int32_t n_criteria;
  int32_t n_pairs;
  int32_t criteria;  // word offset of the first CriterionRecord
  int32_t pairs;     // word offset of the first PairRecord
  int32_t flags;
  float veto_reward;
  float kappa;
  float gain;  // alpha * (1 - kappa)
  float power;
  int32_t reserved[3];
};

enum CriterionFlags : int32_t { kSaturates = 1, kVeto = 2, kFailsHigh = 4 };

struct alignas(16) CriterionRecord {
  float weight;
  float ceiling_weight;  // weight * g(1) where weight > 0, else 0
  float theta;
  float rate;  // log2(e) * beta / (1 - theta)
  float span;  // (1 - theta) / beta
  float tau;
  int32_t flags;
  int32_t reserved;
};

enum PairKind : int32_t { kProduct = 0, kMin = 1, kGap = 2 };

struct alignas(16) PairRecord {
  uint16_t a;
  uint16_t b;
  int32_t kind;
  float weight;
  float ceiling_weight;  // weight * ceiling where weight > 0, else 0
};

static_assert(sizeof(TableHeader) == 32 && sizeof(RubricRecord) == 48, "table layout");
static_assert(sizeof(CriterionRecord) == 32 && sizeof(PairRecord) == 16, "table layout");

}  // namespace megarubric
