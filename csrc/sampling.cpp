#include "sampling.h"

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <vector>

#include "scratch.h"

namespace tramontane {
namespace {

// Weights are relative to the highest. Few tokens are heavy, and nearly always they decide the draw.
constexpr float HEAVY = 1.0f / 2048, NOTHING = std::numeric_limits<float>::denorm_min();

// The tokens of a row that weigh at least `floor`, in descending order of logit, lower ids first among equals, without
// sorting them all.
//
// Tokens are counted into buckets by their distance from the highest logit, so that the token at which a count or a
// mass is reached lies in a known bucket, and only that one is sorted.
class Ranking {
   public:
    struct Place {
        int32_t token;
        double mass;  // of the tokens up to this one, included
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
                Place place{0, mass};
                for (int32_t token : sorted(b)) {
                    place = {token, place.mass + weights_[token]};
                    if (reached(++count, place.mass)) break;
                }
                return place;  // the bucket's last, where sums in another order round below
            }
            count += counts_[b];
            mass += masses_[b];
        }
        return std::nullopt;
    }

    template <class Kept>
    double mass(Kept kept) const {
        double mass = 0;
        for (int32_t i : tokens_)
            if (kept(i)) mass += weights_[i];
        return mass;
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
    if (floor == NOTHING) mass = ranking.mass([](int32_t) { return true; });
    // Every cut keeps a prefix of the order, so the mass it leaves is all that the draw needs.
    if (how.top_k > 0 && how.top_k < size) {
        const auto last = ranking.first([&](int64_t count, double) { return count >= how.top_k; });
        if (last) mass = ranking.mass([&](int32_t i) { return scaled[i] >= scaled[last->token]; });
        if (!last && floor > NOTHING) return std::nullopt;
    }
    if (how.top_p < 1) {
        const auto last = ranking.first([&](int64_t, double sum) { return sum >= how.top_p * mass; });
        if (!last) return std::nullopt;
        mass = last->mass;
    }
    if (how.min_p > 0) {
        if (how.min_p < floor) return std::nullopt;
        mass = std::min(mass, ranking.mass([&](int32_t i) { return weights[i] >= how.min_p; }));
    }
    const auto token = ranking.first([&](int64_t, double sum) { return sum > how.uniform * mass; });
    return token ? std::optional(token->token) : std::nullopt;
}

}  // namespace

int32_t sample(const Kernels& kernels, const float* logits, int64_t vocabulary, const Sampling& how) {
    if (how.temperature != 0) {
        float* scaled = scratch(Scratch::PIECE, 2 * vocabulary);
        float* weights = scaled + vocabulary;
        double mass = 0;
        const float highest = kernels.softmax_weights(scaled, weights, &mass, logits, vocabulary, how.temperature);
        for (float floor : {HEAVY, NOTHING})
            if (const auto token = draw(scaled, weights, vocabulary, highest, floor, mass, how)) return *token;
    }
    return static_cast<int32_t>(kernels.argmax(logits, vocabulary));  // also of what is infinite or not a number
}

}  // namespace tramontane
