#include "sampling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "scratch.h"

namespace tramontane {
namespace {

// Weights are relative to the highest. Few tokens are heavy, and nearly always they decide the draw, or those do that
// are not quite light.
constexpr float HEAVY = 0x1p-11f, LIGHT = 0x1p-25f, NOTHING = std::numeric_limits<float>::denorm_min();

// The tokens of a row that weigh at least `floor`, in descending order of logit, lower ids first among equals, without
// sorting them all.
//
// Tokens are counted into buckets by their distance from the highest logit, so that the token at which a count or a
// mass is reached lies in a known bucket, and only that one is sorted.
class Ranking {
   public:
    struct Place {
        int32_t token;
        double before, mass;  // of the tokens up to this one, without it and with it
        int64_t count;        // the same, with it
    };
    struct Share {
        int64_t count;
        double mass;
    };

    Ranking(const float* scaled, const float* weights, int64_t size, float highest, float floor)
        : scaled_(scaled), weights_(weights) {
        for (int32_t i = 0; i < size; i++)
            if (weights[i] >= floor) tokens_.push_back(i);
        buckets_.reserve(tokens_.size());
        for (int32_t i : tokens_) {
            const int b = static_cast<int>(std::min((highest - scaled[i]) * BUCKETS_A_UNIT, BUCKETS - 1.0f));
            buckets_.push_back(static_cast<uint16_t>(b));
            counts_[b]++;
            masses_[b] += weights[i];
        }
    }

    int64_t count() const { return static_cast<int64_t>(tokens_.size()); }

    // The first token at which reached(count, mass) of the tokens so far; none where it never is.
    template <class Reached>
    std::optional<Place> first(Reached reached) const {
        int64_t count = 0;
        double mass = 0;
        for (int b = 0; b < BUCKETS; b++) {
            if (counts_[b] > 0 && reached(count + counts_[b], mass + masses_[b])) {
                Place place{0, mass, mass, count};
                for (int32_t token : sorted(b)) {
                    place = {token, place.mass, place.mass + weights_[token], place.count + 1};
                    if (reached(place.count, place.mass)) break;
                }
                return place;  // the bucket's last, where sums in another order round below
            }
            count += counts_[b];
            mass += masses_[b];
        }
        return std::nullopt;
    }

    template <class Kept>
    Share share(Kept kept) const {
        Share share{0, 0};
        for (int32_t i : tokens_)
            if (kept(i)) share = {share.count + 1, share.mass + weights_[i]};
        return share;
    }

   private:
    static constexpr int BUCKETS = 1024;
    static constexpr float BUCKETS_A_UNIT = 16;  // of logit; those more than 64 units below the highest share the last

    std::vector<int32_t> sorted(int b) const {
        std::vector<int32_t> tokens;
        tokens.reserve(counts_[b]);
        for (size_t i = 0; i < buckets_.size(); i++)
            if (buckets_[i] == b) tokens.push_back(tokens_[i]);
        std::stable_sort(tokens.begin(), tokens.end(), [&](int32_t i, int32_t j) { return scaled_[i] > scaled_[j]; });
        return tokens;
    }

    const float* scaled_;
    const float* weights_;
    std::vector<int32_t> tokens_;    // in ascending order
    std::vector<uint16_t> buckets_;  // of tokens_
    std::array<int64_t, BUCKETS> counts_{};
    std::array<double, BUCKETS> masses_{};
};

// The draw, where the tokens that weigh at least `floor` decide it. `mass` is that of the whole row; among all of its
// tokens it is summed as they are, so that a share of it below one is always reached.
std::optional<int32_t> draw(const float* scaled, const float* weights, int64_t size, float highest, float floor,
                            double mass, const Sampling& how) {
    const Ranking ranking(scaled, weights, size, highest, floor);
    if (floor == NOTHING) mass = ranking.share([](int32_t) { return true; }).mass;
    // These cuts keep a prefix of the order, so its size and mass are all that the draw needs.
    int64_t kept = size;
    if (how.top_k > 0 && how.top_k < size) {
        const auto last = ranking.first([&](int64_t count, double) { return count >= how.top_k; });
        if (last) {
            const auto share = ranking.share([&](int32_t i) { return scaled[i] >= scaled[last->token]; });
            kept = share.count;
            mass = share.mass;
        }
        if (!last && floor > NOTHING) return std::nullopt;
    }
    if (how.top_p < 1) {
        const auto last = ranking.first([&](int64_t, double sum) { return sum >= how.top_p * mass; });
        if (!last) return std::nullopt;
        kept = last->count;
        mass = last->mass;
    }
    if (how.min_p > 0) {
        if (how.min_p < floor) return std::nullopt;
        const auto share = ranking.share([&](int32_t i) { return weights[i] >= how.min_p; });
        kept = std::min(kept, share.count);
        mass = std::min(mass, share.mass);
    }
    double skipped = 0;
    if (how.xtc_threshold < 1) {
        const float least = std::max(static_cast<float>(how.xtc_threshold * mass), NOTHING);
        if (least < floor) return std::nullopt;
        const int64_t top = std::min(kept, ranking.share([&](int32_t i) { return weights[i] >= least; }).count);
        if (top > 1) skipped = ranking.first([&](int64_t count, double) { return count >= top; })->before;
    }
    const double wanted = skipped + how.uniform * (mass - skipped);
    const auto token = ranking.first([&](int64_t, double sum) { return sum > wanted; });
    return token ? std::optional(token->token) : std::nullopt;
}

// The weights of all but the typical tokens become nothing; those of the others, and `mass`, relative to the highest of
// them, which is returned. `top_k` has its effect before.
float keep_typical(const float* scaled, float* weights, float* nearness, int64_t size, float highest, double& mass,
                   const Sampling& how) {
    if (how.top_k > 0 && how.top_k < size) {
        const Ranking ranking(scaled, weights, size, highest, NOTHING);
        if (const auto last = ranking.first([&](int64_t count, double) { return count >= how.top_k; }))
            for (int64_t i = 0; i < size; i++)
                if (scaled[i] < scaled[last->token]) weights[i] = 0;
    }
    // The information of a token, but for a constant, is its distance from the highest.
    double whole = 0, expected = 0;
    for (int64_t i = 0; i < size; i++)
        if (weights[i] >= NOTHING) {
            whole += weights[i];
            expected += weights[i] * static_cast<double>(highest - scaled[i]);
        }
    expected /= whole;
    for (int64_t i = 0; i < size; i++)
        nearness[i] = -static_cast<float>(std::abs(static_cast<double>(highest - scaled[i]) - expected));
    const Ranking ranking(nearness, weights, size, 0, NOTHING);
    const auto last = ranking.first([&](int64_t, double sum) { return sum >= how.typical_p * whole; });
    const float least = last ? nearness[last->token] : -std::numeric_limits<float>::infinity();
    int64_t best = -1;
    for (int64_t i = 0; i < size; i++) {
        if (nearness[i] < least) weights[i] = 0;
        if (weights[i] >= NOTHING && (best < 0 || scaled[i] > scaled[best])) best = i;
    }
    if (best < 0) return highest;
    mass = 0;
    const float unit = weights[best];
    for (int64_t i = 0; i < size; i++) mass += weights[i] /= unit;
    return scaled[best];
}

}  // namespace

int32_t sample(const Kernels& kernels, const float* logits, int64_t vocabulary, const Sampling& how) {
    if (how.temperature != 0) {
        const bool typical = how.typical_p < 1;
        float* scaled = scratch(Scratch::PIECE, (typical ? 3 : 2) * vocabulary);
        float* weights = scaled + vocabulary;
        double mass = 0;
        float highest = kernels.softmax_weights(scaled, weights, &mass, logits, vocabulary, how.temperature);
        Sampling left = how;
        if (typical) {
            highest = keep_typical(scaled, weights, weights + vocabulary, vocabulary, highest, mass, how);
            left.top_k = 0;
        }
        for (float floor : {HEAVY, LIGHT, NOTHING})
            if (const auto token = draw(scaled, weights, vocabulary, highest, floor, mass, left)) return *token;
    }
    return static_cast<int32_t>(kernels.argmax(logits, vocabulary));  // also of what is infinite or not a number
}

}  // namespace tramontane
