// What chooses experts and tokens, as Python calls it; see kernels/base.py for what each op does.
#pragma once

#include "ops.h"
#include "routing.h"
#include "sampling.h"
#include "simple.h"

namespace tramontane {
namespace {
#include "pieces.h"
}

constexpr const char* SCORES[] = {"softmax", "sigmoid", "sparsemixer"};
constexpr const char* GROUP_SCORES[] = {"max", "top2"};

class Choices {
   public:
    explicit Choices(Device& device) : device_(device), pool_(device.pool), kernels_(device.set.kernels) {}

    void route(handle weights_, handle experts_, handle logits_, handle correction_, const char* score, bool normalize,
               float scale, int64_t groups, int64_t top_groups, const char* group_score, float jitter) {
        const Array logits(logits_, "logits", FLOAT32, {ANY, ANY});
        const Array weights(weights_, "weights", FLOAT32, {logits[0], ANY}, true);
        const Array experts(experts_, "experts", INT32, {logits[0], weights[1]}, true);
        const bool best_two = kind_of<int>(group_score, GROUP_SCORES, "group_score") == 1;
        const Routing r = {weights.data<float>(), experts.data<int32_t>(), logits.data<const float>(),
                           floats_or_null(correction_, "correction", {logits[1]}), weights[1], logits[1], groups,
                           top_groups, kind_of<Score>(score, SCORES, "score"), normalize, best_two, scale, jitter};
        require(0 < top_groups && top_groups <= groups && r.count % groups == 0, "groups must divide the experts");
        require(!best_two || r.count / groups >= 2, "groups must have two experts");
        require(r.chosen <= r.count / groups * top_groups, "experts must be fewer than are to choose from");
        require(r.score != Score::SPARSEMIXER || (r.chosen == 2 && groups == 1),
                "sparsemixer chooses 2, without groups");
        const int64_t tokens = logits[0];
        device_.compute(logits.size(), [=, this] {
            parallel(pool_, tokens, r.count < ROUTED ? ROUTED / (r.count + 1) : 1, [&](int64_t begin, int64_t end) {
                for (int64_t t = begin; t < end; t++) tramontane::route(kernels_, r, t);
            });
        });
    }

    void group_rows(handle rows_, handle slots_, handle offsets_, handle experts_) {
        const Array experts(experts_, "experts", INT32, {ANY, ANY}), rows(rows_, "rows", INT32, {experts.size()}, true);
        const Array slots(slots_, "slots", INT32, {experts[0], experts[1]}, true);
        const Array offsets(offsets_, "offsets", INT32, {ANY}, true);
        require(offsets[0] > 0, "offsets must have one place more than there are experts");
        device_.compute(experts.size(), [=] {
            check_ids(experts, "experts", offsets[0] - 1);
            tramontane::group_rows(rows.data<int32_t>(), slots.data<int32_t>(), offsets.data<int32_t>(),
                                   experts.data<const int32_t>(), experts.size(), experts[1], offsets[0] - 1);
        });
    }

    void combine(handle out_, handle x_, handle slots_, handle weights_) {
        const Array out(out_, "out", FLOAT32, {ANY, ANY}, true), x(x_, "x", FLOAT32, {ANY, out[1]});
        const Array slots(slots_, "slots", INT32, {out[0], ANY});
        const Array weights(weights_, "weights", FLOAT32, {out[0], slots[1]});
        if (out.size() == 0) return;
        device_.compute(x.size(), [=, this] {
            check_ids(slots, "slots", x[0]);
            kernels_.combine(pool_, out.data<float>(), x.data<const float>(), slots.data<const int32_t>(),
                             weights.data<const float>(), out[0], slots[1], out[1]);
        });
    }

    void take_rows(handle out_, handle x_, handle rows_) {
        const Array x(x_, "x", FLOAT32, {ANY, ANY}), rows(rows_, "rows", INT32, {ANY});
        const Array out(out_, "out", FLOAT32, {rows[0], x[1]}, true);
        device_.compute(out.size(), [=] {
            check_ids(rows, "rows", x[0]);
            tramontane::take_rows(out.data<float>(), x.data<const float>(), rows.data<const int32_t>(), rows[0], x[1]);
        });
    }

    void apply_edits(handle logits_, handle rows_, handle ids_, handle penalties_, handle biases_) {
        const Array logits(logits_, "logits", FLOAT32, {ANY, ANY}, true), rows(rows_, "rows", INT32, {ANY});
        const Array ids(ids_, "ids", INT32, {rows[0]}), penalties(penalties_, "penalties", FLOAT32, {rows[0]});
        const Array biases(biases_, "biases", FLOAT32, {rows[0]});
        device_.compute(rows[0], [=] {
            check_ids(rows, "rows", logits[0]);
            check_ids(ids, "ids", logits[1]);
            tramontane::apply_edits(logits.data<float>(), logits[1], rows.data<const int32_t>(),
                                    ids.data<const int32_t>(), penalties.data<const float>(),
                                    biases.data<const float>(), rows[0]);
        });
    }

    void mask(handle logits_, handle rows_, handle masks_) {
        const Array logits(logits_, "logits", FLOAT32, {ANY, ANY}, true), rows(rows_, "rows", INT32, {ANY});
        const Array masks(masks_, "masks", INT32, {rows[0], (logits[1] + 31) / 32});
        device_.compute(rows[0] * logits[1], [=] {
            check_ids(rows, "rows", logits[0]);
            tramontane::mask(logits.data<float>(), logits[1], rows.data<const int32_t>(), masks.data<const int32_t>(),
                             rows[0]);
        });
    }

    void log_softmax(handle out_, handle logits_) {
        const Array logits(logits_, "logits", FLOAT32, {ANY, ANY});
        const Array out(out_, "out", FLOAT32, {logits[0], logits[1]}, true);
        if (logits.size() == 0) return;
        device_.compute(logits.size(), [=, this] {
            kernels_.log_softmax(pool_, out.data<float>(), logits.data<const float>(), logits[0], logits[1]);
        });
    }

    void sample(handle tokens_, handle logits_, handle temperature_, handle top_k_, handle top_p_, handle min_p_,
                handle uniform_, handle typical_p_, handle xtc_threshold_) {
        const Array logits(logits_, "logits", FLOAT32, {ANY, ANY}), tokens(tokens_, "tokens", INT32, {logits[0]}, true);
        const Array temperature(temperature_, "temperature", FLOAT32, {logits[0]});
        const Array top_k(top_k_, "top_k", INT32, {logits[0]}), top_p(top_p_, "top_p", FLOAT32, {logits[0]});
        const Array min_p(min_p_, "min_p", FLOAT32, {logits[0]}), uniform(uniform_, "uniform", FLOAT32, {logits[0]});
        const float* typical_p = floats_or_null(typical_p_, "typical_p", {logits[0]});
        const float* xtc_threshold = floats_or_null(xtc_threshold_, "xtc_threshold", {logits[0]});
        if (logits[0] == 0) return;
        require(logits[1] > 0, "logits must have columns");
        device_.compute(logits.size(), [=, this] {
            parallel(pool_, logits[0], 1, [&](int64_t begin, int64_t end) {
                for (int64_t r = begin; r < end; r++) {
                    const Sampling how = {temperature.data<float>()[r], top_k.data<int32_t>()[r],
                                          top_p.data<float>()[r],       min_p.data<float>()[r],
                                          uniform.data<float>()[r],     typical_p ? typical_p[r] : 1,
                                          xtc_threshold ? xtc_threshold[r] : 1};
                    const float* row = logits.data<const float>() + r * logits[1];
                    tokens.data<int32_t>()[r] = tramontane::sample(kernels_, row, logits[1], how);
                }
            });
        });
    }

   private:
    static constexpr int64_t ROUTED = 4096;  // logits of tokens worth another thread

    Device& device_;
    Pool& pool_;
    const Kernels& kernels_;
};

}  // namespace tramontane
